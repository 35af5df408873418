// One index key or query head in eight bits: the arithmetic of src/dsa/ops/quantize/README.md, every step rounded on
// its own, so that the bytes are those of the reference on every instruction set.
#pragma once

#include <float.h>

#include "kernels/simd.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int kKeyLevels = 127;
constexpr int kQueryLevels = 63;

// Multiplies by the orthonormal Hadamard matrix where `dim` is a power of two, else leaves the row as it is.
DSA_INLINE void rotate_row(float* DSA_RESTRICT row, int64_t dim) {
    if ((dim & (dim - 1)) != 0) return;
    for (int64_t distance = 1; distance < dim; distance *= 2) {
        for (int64_t start = 0; start < dim; start += 2 * distance) {
            for (int64_t i = start; i < start + distance; ++i) {
                const float a = row[i], b = row[i + distance];
                row[i] = a + b;
                row[i + distance] = a - b;
            }
        }
    }
    const float norm = static_cast<float>(1.0 / sqrt(static_cast<double>(dim)));
    for (int64_t i = 0; i < dim; ++i) row[i] *= norm;
}

// Rotates `row` in place, writes whole numbers in [-levels, levels] to `out` and returns the scale: 1 for a row of
// zeros, NaN (and zeros in `out`) for a row that is not finite.
DSA_INLINE float quantize_row(float* DSA_RESTRICT row, int64_t dim, int levels, int8_t* DSA_RESTRICT out) {
    rotate_row(row, dim);
    float highest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < dim; ++i) {
        const float magnitude = __builtin_fabsf(row[i]);
        finite &= magnitude <= FLT_MAX;
        highest = highest > magnitude ? highest : magnitude;
    }
    if (!finite) {
        memset(out, 0, static_cast<size_t>(dim));
        return __builtin_nanf("");
    }
    float scale = highest / static_cast<float>(levels);
    if (scale == 0.0f) scale = 1.0f;
    const float limit = static_cast<float>(levels);
    for (int64_t i = 0; i < dim; ++i) {
        float x = row[i] / scale;
        x = x > limit ? limit : x;
        x = x < -limit ? -limit : x;
        // Adding and taking away 1.5 * 2^23 rounds half to even.
        x = (x + 0x1.8p23f) - 0x1.8p23f;
        out[i] = static_cast<int8_t>(x);
    }
    return scale;
}

template <class T>
DSA_INLINE void widen_row(const T* p, int64_t stride, int64_t dim, float* DSA_RESTRICT row) {
    for (int64_t i = 0; i < dim; ++i) row[i] = widen(p[i * stride]);
}

}  // namespace
}  // namespace dsa::DSA_ISA
