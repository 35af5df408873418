// What both forms of the indexer's loss share: the register-blocked product, rows widened to fp32, and the last step
// that writes the gradients.
#pragma once

#include <float.h>

#include "dsa/indexer_loss.h"
#include "kernels/simd.h"

namespace dsa::DSA_ISA {
namespace {

constexpr float kLowest = -FLT_MAX;
// A query counts if the tokens that it compares hold this much of its heads' attention. Of less, shares that matter
// would be subnormal and lose their digits.
constexpr float kLeastMass = FLT_MIN / FLT_EPSILON;

// kVectors x kColumns sums in registers. How many columns go with how many vectors: as many as the registers hold.
template <int kVectors>
constexpr int columns_at_once() {
#if defined(__AVX512F__)
    return kVectors == 1 ? 12 : 8;
#else
    return kVectors == 1 ? 8 : kVectors == 2 ? 6 : 4;
#endif
}

// out[column][vector] (+)= sum over i < length of a[i][vector] * b[column][i]: `a` and `out` are rows of vectors, `b`
// is read one number at a time.
template <int kVectors, int kColumns, bool kAdd>
DSA_INLINE void product_tile(const float* a, int64_t a_step, const float* b, int64_t b_column, int64_t b_step,
                             int64_t length, float* out, int64_t out_column) {
    F32 sum[kColumns][kVectors];
#pragma GCC unroll 16
    for (int n = 0; n < kColumns; ++n)
#pragma GCC unroll 4
        for (int r = 0; r < kVectors; ++r) sum[n][r] = kAdd ? load(out + n * out_column + r * kWidth) : zero();
    for (int64_t i = 0; i < length; ++i) {
        F32 left[kVectors];
#pragma GCC unroll 4
        for (int r = 0; r < kVectors; ++r) left[r] = load(a + i * a_step + r * kWidth);
#pragma GCC unroll 16
        for (int n = 0; n < kColumns; ++n) {
            const F32 right = broadcast(b[n * b_column + i * b_step]);
#pragma GCC unroll 4
            for (int r = 0; r < kVectors; ++r) sum[n][r] = fma(left[r], right, sum[n][r]);
        }
    }
#pragma GCC unroll 16
    for (int n = 0; n < kColumns; ++n)
#pragma GCC unroll 4
        for (int r = 0; r < kVectors; ++r) store(out + n * out_column + r * kWidth, sum[n][r]);
}

template <int kVectors, bool kAdd>
void product_columns(const float* a, int64_t a_step, const float* b, int64_t b_column, int64_t b_step, int64_t columns,
                     int64_t length, float* out, int64_t out_column) {
    constexpr int kMost = columns_at_once<kVectors>();
    int64_t n = 0;
    for (; n + kMost <= columns; n += kMost)
        product_tile<kVectors, kMost, kAdd>(a, a_step, b + n * b_column, b_column, b_step, length, out + n * out_column,
                                            out_column);
    for (; n + 2 <= columns; n += 2)
        product_tile<kVectors, 2, kAdd>(a, a_step, b + n * b_column, b_column, b_step, length, out + n * out_column,
                                        out_column);
    if (n < columns)
        product_tile<kVectors, 1, kAdd>(a, a_step, b + n * b_column, b_column, b_step, length, out + n * out_column,
                                        out_column);
}

// The same for any number of vectors.
template <bool kAdd>
void product(int64_t vectors, const float* a, int64_t a_step, const float* b, int64_t b_column, int64_t b_step,
             int64_t columns, int64_t length, float* out, int64_t out_column) {
    while (vectors > 0) {
        const int64_t take = vectors == 4 ? 2 : smaller<int64_t>(vectors, 3);
        if (take == 3)
            product_columns<3, kAdd>(a, a_step, b, b_column, b_step, columns, length, out, out_column);
        else if (take == 2)
            product_columns<2, kAdd>(a, a_step, b, b_column, b_step, columns, length, out, out_column);
        else
            product_columns<1, kAdd>(a, a_step, b, b_column, b_step, columns, length, out, out_column);
        vectors -= take;
        a += take * kWidth;
        out += take * kWidth;
    }
}

template <class T>
DSA_INLINE void widen_into(const T* p, int64_t stride, int64_t count, float* DSA_RESTRICT out) {
    if (stride == 1) {
        int64_t i = 0;
        for (; i + kWidth <= count; i += kWidth) store(out + i, load(p + i));
        for (; i < count; ++i) out[i] = widen(p[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = widen(p[i * stride]);
    }
}

// The last dim of a tensor at an offset in elements, in fp32.
inline void read_row(const dsa_tensor& tensor, int64_t offset, float* out) {
    const int64_t count = tensor.size[tensor.dims - 1], stride = tensor.stride[tensor.dims - 1];
    switch (tensor.dtype) {
        case DSA_F32: return widen_into(static_cast<const float*>(tensor.data) + offset, stride, count, out);
        case DSA_BF16: return widen_into(static_cast<const Bf16*>(tensor.data) + offset, stride, count, out);
        case DSA_F16: return widen_into(static_cast<const F16*>(tensor.data) + offset, stride, count, out);
    }
}

DSA_INLINE int64_t range_at(const dsa_tensor& tensor, int64_t b, int64_t t) {
    return static_cast<const int32_t*>(tensor.data)[b * tensor.stride[0] + t * tensor.stride[1]];
}

// What a query sees and which part of it the loss compares; all empty where nothing is compared.
struct Range {
    int64_t begin, end, kept_begin, kept_end;
};

inline Range range_of(const dsa_indexer_loss_args& args, int64_t b, int64_t t) {
    Range range;
    range.begin = range_at(args.key_start, b, t);
    range.end = range_at(args.key_end, b, t);
    range.kept_begin = range.begin + smaller(args.sinks, args.k.size[1]);
    range.kept_end = range.end - smaller(args.local, args.k.size[1]);
    if (range.kept_end <= range.kept_begin) range = {0, 0, 0, 0};
    return range;
}

// softcap * tanh(x / softcap).
DSA_INLINE F32 capped(F32 x, F32 softcap) { return softcap * tanh(x / softcap); }

DSA_INLINE void clear(float* p, int64_t count) { memset(p, 0, static_cast<size_t>(count) * 4); }

// Gradients are summed over queries; the loss is their mean.
inline void scale_gradient(const dsa_tensor& tensor, float share, int threads) {
    int64_t total = 1;
    for (int dim = 0; dim < tensor.dims; ++dim) total *= tensor.size[dim];
    const int64_t at_a_time = 1 << 16, items = ceil_div(total, at_a_time);
    float* data = static_cast<float*>(tensor.data);
    for_each_item(items, threads, [&](int64_t item, int) {
        const int64_t last = smaller((item + 1) * at_a_time, total);
        for (int64_t i = item * at_a_time; i < last; ++i) data[i] *= share;
    });
}

}  // namespace

// Eq. 3 and eq. 4, each in a file of its own: add to the sum of divergences and to the number of queries in it.
int indexer_loss_visible(const dsa_indexer_loss_args& args, int threads, double* loss, int64_t* count);
int indexer_loss_selected(const dsa_indexer_loss_args& args, int threads, double* loss, int64_t* count);

}  // namespace dsa::DSA_ISA
