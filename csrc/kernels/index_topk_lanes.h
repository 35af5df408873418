// Vectors of integers in addition to simd.h's F32, comparisons that give bits, and stores of chosen lanes: what
// index_topk needs of each instruction set.
#pragma once

#include "kernels/simd.h"

namespace dsa::DSA_ISA {
namespace {

// How the bytes of keys and queries lie in a 32-bit lane, and what is added to a key's: `dot` of some instruction
// sets takes unsigned keys.
#if defined(__AVX2__)
constexpr int kDimsInLane = 4;
constexpr int kKeyOffset = 128;
#elif defined(__aarch64__)
constexpr int kDimsInLane = 4;
constexpr int kKeyOffset = 0;
#else
constexpr int kDimsInLane = 2;
constexpr int kKeyOffset = 0;
#endif

// Words of a key that are multiplied at a time. Two where products are added in 16 bits first, which saves a multiplication
// in four.
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
#define DSA_WORDS_IN_PAIRS
constexpr int kWordsAtATime = 2;
#else
constexpr int kWordsAtATime = 1;
#endif

#if defined(__AVX512F__)

struct I32 {
    __m512i v;
};

DSA_INLINE I32 broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
DSA_INLINE I32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
DSA_INLINE void store(int32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }
DSA_INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
DSA_INLINE I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
DSA_INLINE F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
// GCC 12 may spill a mask as 16 bits and read it back as 32, the upper ones being whatever lay there. An ordinary
// register between the two keeps it from that.
DSA_INLINE uint32_t in_register(uint32_t bits) {
    __asm__("" : "+r"(bits));
    return bits;
}
DSA_INLINE uint32_t above(F32 a, F32 b) { return in_register(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)); }
DSA_INLINE uint32_t above(I32 a, I32 b) { return in_register(_mm512_cmpgt_epi32_mask(a.v, b.v)); }
DSA_INLINE uint32_t equal(I32 a, I32 b) { return in_register(_mm512_cmpeq_epi32_mask(a.v, b.v)); }
DSA_INLINE I32 counting_up() { return {_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)}; }

DSA_INLINE I32 ordered(F32 score) {
    const __m512i bits = _mm512_castps_si512(_mm512_add_ps(score.v, _mm512_setzero_ps()));
    const __m512i flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(INT32_MAX));
    const __mmask16 unknown = _mm512_cmp_ps_mask(score.v, score.v, _CMP_UNORD_Q);
    return {_mm512_mask_blend_epi32(unknown, _mm512_xor_si512(bits, flip), _mm512_set1_epi32(INT32_MIN + 1))};
}

// Into a register first: the form that writes to memory is slow on some processors.
DSA_INLINE void store_chosen(int32_t* p, I32 a, uint32_t chosen) {
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(chosen), a.v));
}

DSA_INLINE I32 dot(I32 sum, I32 key, I32 query) {
#if defined(__AVX512VNNI__)
    // Written out because GCC 12 copies the sum before and after the builtin, which costs more than the product.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(key.v), "v"(query.v));
    return sum;
#else
    const __m512i pairs = _mm512_maddubs_epi16(key.v, query.v);
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#endif
}

#elif defined(__AVX2__)

struct I32 {
    __m256i v;
};

DSA_INLINE I32 broadcast(int32_t x) { return {_mm256_set1_epi32(x)}; }
DSA_INLINE I32 load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
DSA_INLINE void store(int32_t* p, I32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
DSA_INLINE I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
DSA_INLINE I32 max(I32 a, I32 b) { return {_mm256_max_epi32(a.v, b.v)}; }
DSA_INLINE F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
DSA_INLINE uint32_t sign_bits(__m256i v) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(v)));
}
DSA_INLINE uint32_t above(F32 a, F32 b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)));
}
DSA_INLINE uint32_t above(I32 a, I32 b) { return sign_bits(_mm256_cmpgt_epi32(a.v, b.v)); }
DSA_INLINE uint32_t equal(I32 a, I32 b) { return sign_bits(_mm256_cmpeq_epi32(a.v, b.v)); }
DSA_INLINE I32 counting_up() { return {_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0)}; }

DSA_INLINE I32 ordered(F32 score) {
    const __m256i bits = _mm256_castps_si256(_mm256_add_ps(score.v, _mm256_setzero_ps()));
    const __m256i flip = _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(INT32_MAX));
    const __m256i unknown = _mm256_castps_si256(_mm256_cmp_ps(score.v, score.v, _CMP_UNORD_Q));
    return {_mm256_blendv_epi8(_mm256_xor_si256(bits, flip), _mm256_set1_epi32(INT32_MIN + 1), unknown)};
}

// For each choice of lanes, their numbers from the lowest on.
struct LanesOfBits {
    uint8_t lane[256][8];
    constexpr LanesOfBits() : lane() {
        for (int bits = 0; bits < 256; ++bits)
            for (int bit = 0, count = 0; bit < 8; ++bit)
                if (bits >> bit & 1) lane[bits][count++] = static_cast<uint8_t>(bit);
    }
};
alignas(64) constexpr LanesOfBits kLanesOfBits;

DSA_INLINE void store_chosen(int32_t* p, I32 a, uint32_t chosen) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLanesOfBits.lane[chosen]));
    store(p, I32{_mm256_permutevar8x32_epi32(a.v, _mm256_cvtepu8_epi32(bytes))});
}

#if defined(__AVXVNNI__)
DSA_INLINE I32 dot(I32 sum, I32 key, I32 query) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.v) : "x"(key.v), "x"(query.v));  // See above.
    return sum;
}
#else
// Queries of at most 63 keep the sums of two products within 16 bits: 2 * 255 * 63 < 2^15. The sum of four may leave them,
// but comes back when what the keys' offset adds is taken away by `correction`: 4 * 127 * 63 < 2^15.
DSA_INLINE I32 dot(I32 sum, const I32 (&key)[2], const I32 (&query)[2], I32 correction) {
    const __m256i first = _mm256_add_epi16(_mm256_maddubs_epi16(key[0].v, query[0].v), correction.v);
    const __m256i four = _mm256_add_epi16(_mm256_maddubs_epi16(key[1].v, query[1].v), first);
    sum.v = _mm256_add_epi32(sum.v, _mm256_madd_epi16(four, _mm256_set1_epi16(1)));
    __asm__("" : "+x"(sum.v));  // GCC would sum in another order, with more sums than there are registers.
    return sum;
}
#endif

#else

struct I32 {
    NativeInt v;
};

DSA_INLINE I32 broadcast(int32_t x) { return {NativeInt{x, x, x, x}}; }
DSA_INLINE I32 load(const int32_t* p) {
    I32 a;
    memcpy(&a.v, p, 16);
    return a;
}
DSA_INLINE void store(int32_t* p, I32 a) { memcpy(p, &a.v, 16); }
DSA_INLINE I32 operator-(I32 a, I32 b) { return {a.v - b.v}; }
DSA_INLINE I32 max(I32 a, I32 b) {
    const NativeInt first = a.v > b.v;
    return {(first & a.v) | (~first & b.v)};
}
DSA_INLINE F32 to_float(I32 a) { return {__builtin_convertvector(a.v, Native)}; }
DSA_INLINE uint32_t sign_bits(NativeInt v) {
#if defined(__x86_64__)
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)v));
#else
    return (v[0] & 1) | (v[1] & 2) | (v[2] & 4) | (v[3] & 8);
#endif
}
DSA_INLINE uint32_t above(F32 a, F32 b) { return sign_bits(a.v > b.v); }
DSA_INLINE uint32_t above(I32 a, I32 b) { return sign_bits(a.v > b.v); }
DSA_INLINE uint32_t equal(I32 a, I32 b) { return sign_bits(a.v == b.v); }
DSA_INLINE I32 counting_up() { return {NativeInt{0, 1, 2, 3}}; }

DSA_INLINE I32 ordered(F32 score) {
    const NativeInt bits = (NativeInt)(score + zero()).v;
    const NativeInt key = bits ^ ((bits >> 31) & INT32_MAX);
    const NativeInt known = score.v == score.v;
    return {(known & key) | (~known & (INT32_MIN + 1))};
}

DSA_INLINE void store_chosen(int32_t* p, I32 a, uint32_t chosen) {
    int32_t lanes[kWidth];
    store(lanes, a);
    int count = 0;
    for (int lane = 0; lane < kWidth; ++lane) {
        p[count] = lanes[lane];
        count += chosen >> lane & 1;
    }
}

DSA_INLINE I32 dot(I32 sum, I32 key, I32 query) {
#if defined(__x86_64__)
    return {sum.v + (NativeInt)_mm_madd_epi16((__m128i)key.v, (__m128i)query.v)};
#elif defined(__aarch64__)
    const int8x16_t k = (int8x16_t)key.v, q = (int8x16_t)query.v;
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(k), vget_low_s8(q)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(k, q));
    return {sum.v + (NativeInt)vpaddq_s32(low, high)};
#else
    return {sum.v + (key.v << 16 >> 16) * (query.v << 16 >> 16) + (key.v >> 16) * (query.v >> 16)};
#endif
}

#endif

// The score that `ordered` gives this integer for; NaN for the integer of NaN.
DSA_INLINE float score_of(int32_t key) {
    return key == INT32_MIN + 1 ? __builtin_nanf("") : from_bits(static_cast<uint32_t>(key ^ (key >> 31 & INT32_MAX)));
}

}  // namespace
}  // namespace dsa::DSA_ISA
