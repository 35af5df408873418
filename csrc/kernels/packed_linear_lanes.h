// Vectors of bytes, and their products with four activations: what packed_linear needs of each instruction set.
#pragma once

#include "kernels/simd.h"

namespace dsa::DSA_ISA {
namespace {

// Where `dot_words` takes quants of eight bits without a sign they are as they lie in memory, else less 128.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define DSA_DOT_UNSIGNED
constexpr bool kUnsignedBytes = true;
#else
constexpr bool kUnsignedBytes = false;
#endif

// How many products of two 16-bit sums can take before they overflow: 2 * (2^bits - 1) * 127 each.
constexpr int sums_in_16_bits(int bits) { return bits == 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1; }

#if defined(__AVX512F__)

struct Bytes {
    __m512i v;
};
struct Sum {
    __m512i v;
};

DSA_INLINE Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
template <int shift>
DSA_INLINE Bytes shifted(Bytes a, int mask) {
    const __m512i moved = shift >= 0 ? _mm512_slli_epi16(a.v, shift >= 0 ? shift : 0)
                                     : _mm512_srli_epi16(a.v, shift < 0 ? -shift : 0);
    return {_mm512_and_si512(moved, _mm512_set1_epi8(static_cast<char>(mask)))};
}
DSA_INLINE Bytes operator|(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
DSA_INLINE Bytes without_offset(Bytes a) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8(-128))}; }
DSA_INLINE Sum start(int32_t x) { return {_mm512_set1_epi32(x)}; }
DSA_INLINE F32 to_float(Sum a) { return {_mm512_cvtepi32_ps(a.v)}; }
DSA_INLINE F32 load_unsigned(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
DSA_INLINE F32 load_signed(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

template <int bits, int words>
DSA_INLINE Sum dot_words(const Bytes* weights, const int32_t* activations, Sum sum) {
#if defined(__AVX512VNNI__)
#pragma GCC unroll 8
    for (int w = 0; w < words; ++w)
        // Written out because GCC 12 copies the sum around the builtin, and loads apart from it.
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(weights[w].v), "m"(activations[w]));
    return sum;
#else
    constexpr int most = sums_in_16_bits(bits);
    __m512i pairs = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int w = 0; w < words; ++w) {
        __m512i weight = weights[w].v, activation = _mm512_set1_epi32(activations[w]);
        if (bits == 8) {
            const __mmask64 negative = _mm512_movepi8_mask(weight);
            activation = _mm512_mask_sub_epi8(activation, negative, _mm512_setzero_si512(), activation);
            weight = _mm512_abs_epi8(weight);
        }
        const __m512i products = _mm512_maddubs_epi16(weight, activation);
        pairs = w % most == 0 ? products : _mm512_add_epi16(pairs, products);
        if (w % most == most - 1 || w == words - 1)
            sum.v = _mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    }
    return sum;
#endif
}

#elif defined(__AVX2__)

struct Bytes {
    __m256i v;
};
struct Sum {
    __m256i v;
};

DSA_INLINE Bytes load_bytes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
template <int shift>
DSA_INLINE Bytes shifted(Bytes a, int mask) {
    const __m256i moved = shift >= 0 ? _mm256_slli_epi16(a.v, shift >= 0 ? shift : 0)
                                     : _mm256_srli_epi16(a.v, shift < 0 ? -shift : 0);
    return {_mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(mask)))};
}
DSA_INLINE Bytes operator|(Bytes a, Bytes b) { return {_mm256_or_si256(a.v, b.v)}; }
DSA_INLINE Bytes without_offset(Bytes a) { return {_mm256_xor_si256(a.v, _mm256_set1_epi8(-128))}; }
DSA_INLINE Sum start(int32_t x) { return {_mm256_set1_epi32(x)}; }
DSA_INLINE F32 to_float(Sum a) { return {_mm256_cvtepi32_ps(a.v)}; }
DSA_INLINE F32 load_unsigned(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
DSA_INLINE F32 load_signed(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}

template <int bits, int words>
DSA_INLINE Sum dot_words(const Bytes* weights, const int32_t* activations, Sum sum) {
#if defined(__AVXVNNI__)
#pragma GCC unroll 8
    for (int w = 0; w < words; ++w) {
        const __m256i activation = _mm256_set1_epi32(activations[w]);
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.v) : "x"(weights[w].v), "x"(activation));
    }
    return sum;
#else
    constexpr int most = sums_in_16_bits(bits);
    __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int w = 0; w < words; ++w) {
        __m256i weight = weights[w].v, activation = _mm256_set1_epi32(activations[w]);
        if (bits == 8) {
            activation = _mm256_sign_epi8(activation, weight);
            weight = _mm256_abs_epi8(weight);
        }
        const __m256i products = _mm256_maddubs_epi16(weight, activation);
        pairs = w % most == 0 ? products : _mm256_add_epi16(pairs, products);
        if (w % most == most - 1 || w == words - 1)
            sum.v = _mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sum;
#endif
}

#else

typedef uint8_t NativeBytes __attribute__((vector_size(16)));
typedef uint16_t NativeHalves __attribute__((vector_size(16)));

struct Bytes {
    NativeBytes v;
};
struct Sum {
    NativeInt v;
};

DSA_INLINE Bytes load_bytes(const uint8_t* p) {
    Bytes a;
    memcpy(&a.v, p, 16);
    return a;
}
template <int shift>
DSA_INLINE Bytes shifted(Bytes a, int mask) {
    const NativeHalves halves = (NativeHalves)a.v;
    const NativeHalves moved = shift >= 0 ? halves << (shift >= 0 ? shift : 0) : halves >> (shift < 0 ? -shift : 0);
    return {(NativeBytes)moved & static_cast<uint8_t>(mask)};
}
DSA_INLINE Bytes operator|(Bytes a, Bytes b) { return {a.v | b.v}; }
DSA_INLINE Bytes without_offset(Bytes a) { return {a.v ^ static_cast<uint8_t>(128)}; }
DSA_INLINE Sum start(int32_t x) { return {NativeInt{x, x, x, x}}; }
DSA_INLINE F32 to_float(Sum a) { return {__builtin_convertvector(a.v, Native)}; }
DSA_INLINE F32 load_unsigned(const uint8_t* p) {
    return {Native{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])}};
}
DSA_INLINE F32 load_signed(const uint8_t* p) {
    int8_t x[4];
    memcpy(x, p, 4);
    return {Native{static_cast<float>(x[0]), static_cast<float>(x[1]), static_cast<float>(x[2]), static_cast<float>(x[3])}};
}

// Weights are taken as bytes with a sign: quants of fewer than eight bits have none to lose.
template <int bits, int words>
DSA_INLINE Sum dot_words(const Bytes* weights, const int32_t* activations, Sum sum) {
#pragma GCC unroll 8
    for (int w = 0; w < words; ++w) {
        const NativeInt activation = start(activations[w]).v;
#if defined(__x86_64__)
        const __m128i weight = (__m128i)weights[w].v, a = (__m128i)activation;
        const __m128i wide = _mm_srai_epi16(_mm_unpacklo_epi8(a, a), 8);
        const __m128i low = _mm_madd_epi16(_mm_srai_epi16(_mm_unpacklo_epi8(weight, weight), 8), wide);
        const __m128i high = _mm_madd_epi16(_mm_srai_epi16(_mm_unpackhi_epi8(weight, weight), 8), wide);
        const __m128 one = _mm_castsi128_ps(low), other = _mm_castsi128_ps(high);
        const __m128i even = _mm_castps_si128(_mm_shuffle_ps(one, other, 0x88));
        const __m128i odd = _mm_castps_si128(_mm_shuffle_ps(one, other, 0xdd));
        sum.v += (NativeInt)_mm_add_epi32(even, odd);
#elif defined(__aarch64__)
        const int8x16_t k = (int8x16_t)weights[w].v, q = (int8x16_t)activation;
        const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(k), vget_low_s8(q)));
        const int32x4_t high = vpaddlq_s16(vmull_high_s8(k, q));
        sum.v += (NativeInt)vpaddq_s32(low, high);
#else
        typedef int8_t Signed __attribute__((vector_size(16)));
        const Signed k = (Signed)weights[w].v, q = (Signed)activation;
        for (int lane = 0; lane < kWidth; ++lane)
            for (int i = 0; i < 4; ++i) sum.v[lane] += k[4 * lane + i] * q[4 * lane + i];
#endif
    }
    return sum;
}

#endif

}  // namespace
}  // namespace dsa::DSA_ISA
