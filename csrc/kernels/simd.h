// One fp32 vector type with the same operations on every instruction set: F32, kWidth lanes.
//
// fp32, bf16 and fp16 are loaded and widened, computed in fp32, and rounded to nearest even when stored.
#pragma once

#include "kernels/variant.h"

#if defined(__x86_64__)
// GCC 12 takes the undefined operands of its own AVX-512 intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace dsa::DSA_ISA {
namespace {

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

DSA_INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

DSA_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

DSA_INLINE float widen(float value) { return value; }

DSA_INLINE float widen(Bf16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

DSA_INLINE float widen(F16 value) {
#if defined(__F16C__)
    return _cvtsh_ss(value.bits);
#elif defined(__aarch64__)
    __fp16 half;
    memcpy(&half, &value.bits, 2);
    return half;
#else
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
    const uint32_t magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // infinity, NaN
    if (magnitude >= 0x400) return from_bits(sign | ((magnitude << 13) + 0x38000000));
    return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-24f));
#endif
}

DSA_INLINE void narrow(float value, float* out) { *out = value; }

DSA_INLINE void narrow(float value, Bf16* out) {
    const uint32_t bits = to_bits(value);
    if (value != value)
        out->bits = static_cast<uint16_t>(bits >> 16 | 0x40);
    else
        out->bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

DSA_INLINE void narrow(float value, F16* out) {
#if defined(__F16C__)
    out->bits = static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    const __fp16 half = static_cast<__fp16>(value);
    memcpy(&out->bits, &half, 2);
#else
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000;
    const float magnitude = from_bits(bits & 0x7fffffff);
    uint32_t half;
    if (magnitude != magnitude) {
        half = 0x7e00;
    } else if (magnitude >= 65520.0f) {
        half = 0x7c00;
    } else if (magnitude < 0x1p-14f) {
        // The last bit of a float between 0.5 and 1 is 2^-24, a subnormal's last place: the sum rounds to it.
        half = to_bits(magnitude + 0x1p-1f) - to_bits(0x1p-1f);
    } else {
        const uint32_t m = bits & 0x7fffffff;
        half = (m - 0x38000000 + 0xfff + (m >> 13 & 1)) >> 13;
    }
    out->bits = static_cast<uint16_t>(sign | half);
#endif
}

#if defined(__AVX512F__)

constexpr int kWidth = 16;
using Native = __m512;

struct F32 {
    Native v;
};

DSA_INLINE F32 zero() { return {_mm512_setzero_ps()}; }
DSA_INLINE F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }
DSA_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
DSA_INLINE F32 load(const Bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
DSA_INLINE F32 load(const F16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
DSA_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
DSA_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
DSA_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
DSA_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
DSA_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
DSA_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
DSA_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
DSA_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
DSA_INLINE F32 select_below(F32 a, F32 b, F32 yes, F32 no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
DSA_INLINE F32 round_even(F32 a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
DSA_INLINE F32 scale_by_power(F32 a, F32 power) { return {_mm512_scalef_ps(a.v, power.v)}; }

#elif defined(__AVX2__)

constexpr int kWidth = 8;
using Native = __m256;

struct F32 {
    Native v;
};

DSA_INLINE F32 zero() { return {_mm256_setzero_ps()}; }
DSA_INLINE F32 broadcast(float x) { return {_mm256_set1_ps(x)}; }
DSA_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
DSA_INLINE F32 load(const Bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
DSA_INLINE F32 load(const F16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
DSA_INLINE void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
DSA_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
DSA_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
DSA_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
DSA_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
DSA_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
DSA_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
DSA_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
DSA_INLINE F32 select_below(F32 a, F32 b, F32 yes, F32 no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
DSA_INLINE F32 round_even(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
DSA_INLINE F32 scale_by_power(F32 a, F32 power) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(power.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), exponent))};
}

#else

// Four lanes through the compiler's vector types: SSE2 on x86-64, NEON on aarch64.
constexpr int kWidth = 4;
typedef float Native __attribute__((vector_size(16)));
typedef int32_t NativeInt __attribute__((vector_size(16)));

struct F32 {
    Native v;
};

DSA_INLINE F32 zero() { return {Native{0, 0, 0, 0}}; }
DSA_INLINE F32 broadcast(float x) { return {Native{x, x, x, x}}; }
DSA_INLINE F32 load(const float* p) {
    F32 a;
    memcpy(&a.v, p, 16);
    return a;
}
DSA_INLINE F32 load(const Bf16* p) { return {Native{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}}; }
DSA_INLINE F32 load(const F16* p) { return {Native{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}}; }
DSA_INLINE void store(float* p, F32 a) { memcpy(p, &a.v, 16); }
DSA_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
DSA_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
DSA_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
DSA_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
#if defined(__aarch64__)
DSA_INLINE F32 fma(F32 a, F32 b, F32 c) { return {(Native)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)}; }
#else
DSA_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
#endif
DSA_INLINE F32 choose(NativeInt condition, F32 yes, F32 no) {
    return {(Native)((condition & (NativeInt)yes.v) | (~condition & (NativeInt)no.v))};
}
DSA_INLINE F32 select_below(F32 a, F32 b, F32 yes, F32 no) { return choose(a.v < b.v, yes, no); }
// As on x86: the second operand where either is NaN.
DSA_INLINE F32 max(F32 a, F32 b) { return choose(a.v > b.v, a, b); }
DSA_INLINE F32 min(F32 a, F32 b) { return choose(a.v < b.v, a, b); }
DSA_INLINE F32 round_even(F32 a) {
    // Adding and taking away 1.5 * 2^23 leaves whole numbers; enough for |a| < 2^22, which is all that exp needs.
    const Native magic = broadcast(0x1.8p23f).v;
    return {(a.v + magic) - magic};
}
DSA_INLINE F32 scale_by_power(F32 a, F32 power) {
    const NativeInt exponent = __builtin_convertvector(power.v, NativeInt) << 23;
    return {(Native)((NativeInt)a.v + exponent)};
}

#endif

DSA_INLINE F32& operator+=(F32& a, F32 b) { return a = a + b; }
DSA_INLINE F32& operator*=(F32& a, F32 b) { return a = a * b; }

// The first `count` lanes (fewer than kWidth); zeros after them.
template <class T>
DSA_INLINE F32 load_partial(const T* p, int64_t count) {
    float lanes[kWidth] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = widen(p[i]);
    return load(lanes);
}

template <class T>
DSA_INLINE void store_partial(T* p, F32 a, int64_t count) {
    float lanes[kWidth];
    store(lanes, a);
    for (int64_t i = 0; i < count; ++i) narrow(lanes[i], p + i);
}

#if defined(__AVX512F__)
DSA_INLINE F32 load_partial(const float* p, int64_t count) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)};
}
DSA_INLINE void store_partial(float* p, F32 a, int64_t count) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), a.v);
}
#endif

DSA_INLINE void store(Bf16* p, F32 a) { store_partial(p, a, kWidth); }

DSA_INLINE void store(F16* p, F32 a) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#else
    store_partial(p, a, kWidth);
#endif
}

// Sum and maximum of the lanes, pairs first: the same order of additions for one width, whatever the data.
DSA_INLINE float reduce_add(F32 a) {
    float lanes[kWidth];
    store(lanes, a);
    for (int half = kWidth / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

DSA_INLINE float reduce_max(F32 a) {
    float lanes[kWidth];
    store(lanes, a);
    for (int half = kWidth / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

#if defined(__AVX2__)
DSA_INLINE __m128 lower_half_sum(__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
DSA_INLINE float sum_of_four(__m128 v) {
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
}
#endif

// exp to about 2 units in the last place: 0 below -87.33 (no subnormals), 0 for -infinity, NaN for NaN; arguments
// above 88.37 are taken as that.
DSA_INLINE F32 exp(F32 x) {
    const F32 lowest = broadcast(-87.33654f);
    const F32 clamped = min(broadcast(88.37626f), max(lowest, x));
    const F32 power = round_even(clamped * broadcast(1.44269504f));
    F32 r = fma(power, broadcast(-0.693359375f), clamped);
    r = fma(power, broadcast(2.12194440e-4f), r);
    F32 p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, r * r, r + broadcast(1.0f));
    return select_below(x, lowest, zero(), scale_by_power(p, power));
}

// Natural logarithm of positive normal numbers to about 2 units in the last place. Zero and subnormals give some number
// near -88; what is not finite is no argument.
DSA_INLINE F32 log(F32 x) {
    typedef int32_t Bits __attribute__((vector_size(4 * kWidth)));
    // x = 2^power * m with m in [sqrt(1/2), sqrt(2)); log(m) = 2 atanh(s).
    const int32_t root_half = 0x3f3504f3;
    const Bits above = (Bits)x.v - root_half;
    const F32 m = {(Native)((above & 0x7fffff) + root_half)};
    const F32 power = {__builtin_convertvector(above >> 23, Native)};
    const F32 s = (m - broadcast(1.0f)) / (m + broadcast(1.0f));
    const F32 square = s * s;
    F32 p = broadcast(0.29581568f);
    p = fma(p, square, broadcast(0.39988735f));
    p = fma(p, square, broadcast(0.66666687f));
    p = fma(p * square, s, power * broadcast(-2.12194440e-4f));
    return fma(power, broadcast(0.693359375f), p + (s + s));
}

// Hyperbolic tangent to about 2 units in the last place; NaN for NaN.
DSA_INLINE F32 tanh(F32 x) {
    const F32 size = max(zero() - x, x);
    const F32 square = x * x;
    F32 p = broadcast(-6.0100561e-3f);
    p = fma(p, square, broadcast(2.0938128e-2f));
    p = fma(p, square, broadcast(-5.3838708e-2f));
    p = fma(p, square, broadcast(0.13332692f));
    p = fma(p, square, broadcast(-0.33333328f));
    const F32 near = fma(p * square, x, x);
    const F32 far = broadcast(1.0f) - broadcast(2.0f) / (exp(size + size) + broadcast(1.0f));
    return select_below(size, broadcast(0.625f), near, select_below(x, zero(), zero() - far, far));
}

}  // namespace
}  // namespace dsa::DSA_ISA
