// Numbers of eight bits with four of exponent and three of mantissa (e4m3, no infinities), to and from fp32.
//
// Plain operations on 32-bit words, which compilers turn into vectors.
#pragma once

#include "kernels/simd.h"

namespace dsa::DSA_ISA {
namespace {

constexpr float kLargestE4m3 = 448.0f;

// A number of e4m3. Subnormal ones are whole multiples of 2^-9; fp32 holds all others with another exponent bias.
DSA_INLINE float from_e4m3(uint8_t code) {
    const uint32_t size = code & 0x7f, sign = static_cast<uint32_t>(code & 0x80) << 24;
    const float small = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-9f;
    uint32_t bits = size < 8 ? to_bits(small) : (size << 20) + (120u << 23);
    if (size == 0x7f) bits = 0x7fc00000;
    return from_bits(bits | sign);
}

// The nearest number of e4m3, half to even, of one in [-448, 448].
DSA_INLINE uint8_t to_e4m3(float x) {
    const uint32_t bits = to_bits(x), size = bits & 0x7fffffff;
    // 20 bits of the mantissa go. Below 2^-6 the numbers are multiples of 2^-9, which adding 1.5 * 2^23 rounds to.
    const uint32_t normal = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120u << 3);
    const uint32_t subnormal = to_bits(from_bits(size) * 0x1p9f + 0x1.8p23f) & 0xff;
    return static_cast<uint8_t>((size >= 0x3c800000 ? normal : subnormal) | (bits >> 24 & 0x80));
}

// Numbers that lie `stride` apart, each times `scale`.
DSA_INLINE void decode_e4m3(const uint8_t* DSA_RESTRICT codes, int64_t stride, int64_t count, float scale,
                            float* DSA_RESTRICT out) {
    if (stride == 1)
        for (int64_t i = 0; i < count; ++i) out[i] = from_e4m3(codes[i]) * scale;
    else
        for (int64_t i = 0; i < count; ++i) out[i] = from_e4m3(codes[i * stride]) * scale;
}

}  // namespace
}  // namespace dsa::DSA_ISA
