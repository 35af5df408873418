// One FP8 row of latent attention: L e4m3 values, an fp32 scale for every 128 of them, R bf16 values.
//
// Plain loops over bytes and 32-bit words, which compilers turn into vectors. What is read and written is that of the
// reference, bit for bit.
#pragma once

#include "kernels/e4m3.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int64_t kScaleGroup = 128;

DSA_INLINE int64_t scales_of(int64_t latent_dim) { return ceil_div(latent_dim, kScaleGroup); }

// A row as fp32 [L + R].
DSA_INLINE void decode_row(const uint8_t* DSA_RESTRICT row, int64_t latent_dim, int64_t rope_dim,
                           float* DSA_RESTRICT out) {
    const uint8_t* scales = row + latent_dim;
    for (int64_t first = 0, group = 0; first < latent_dim; first += kScaleGroup, ++group) {
        float scale;
        memcpy(&scale, scales + 4 * group, 4);
        const int64_t end = smaller(first + kScaleGroup, latent_dim);
        decode_e4m3(row + first, 1, end - first, scale, out + first);
    }
    const uint8_t* rotated = scales + 4 * scales_of(latent_dim);
    for (int64_t i = 0; i < rope_dim; ++i) {
        uint16_t bits;
        memcpy(&bits, rotated + 2 * i, 2);
        out[latent_dim + i] = from_bits(static_cast<uint32_t>(bits) << 16);
    }
}

// The next power of two, which may be the number itself, of a positive one.
DSA_INLINE float up_to_power_of_two(float x) {
    const uint32_t bits = to_bits(x);
    if (bits >= 0x00800000) return from_bits((bits + 0x7fffff) & 0x7f800000);
    uint32_t power = 1;
    while (power < bits) power <<= 1;
    return from_bits(power);
}

// fp32 [L + R] to a row.
DSA_INLINE void encode_row(const float* DSA_RESTRICT x, int64_t latent_dim, int64_t rope_dim, bool power_of_two,
                           uint8_t* DSA_RESTRICT row) {
    uint8_t* scales = row + latent_dim;
    for (int64_t first = 0, group = 0; first < latent_dim; first += kScaleGroup, ++group) {
        const int64_t end = smaller(first + kScaleGroup, latent_dim);
        // As integers the sizes of floats are ordered, NaN above infinity above all numbers.
        uint32_t largest = 0;
        for (int64_t i = first; i < end; ++i) largest = larger(largest, to_bits(x[i]) & 0x7fffffff);
        float scale = from_bits(largest) / kLargestE4m3;
        if (power_of_two && scale > 0.0f && largest < 0x7f800000) scale = up_to_power_of_two(scale);
        if (scale == 0.0f) scale = 1.0f;
        if (largest >= 0x7f800000) {
            memset(row + first, 0, static_cast<size_t>(end - first));
            scale = from_bits(0x7fc00000);
        } else {
            for (int64_t i = first; i < end; ++i) {
                const float level = x[i] / scale;
                row[i] = to_e4m3(smaller(larger(level, -kLargestE4m3), kLargestE4m3));
            }
        }
        memcpy(scales + 4 * group, &scale, 4);
    }
    uint8_t* rotated = scales + 4 * scales_of(latent_dim);
    for (int64_t i = 0; i < rope_dim; ++i) {
        Bf16 value;
        narrow(x[latent_dim + i], &value);
        memcpy(rotated + 2 * i, &value.bits, 2);
    }
}

}  // namespace
}  // namespace dsa::DSA_ISA
