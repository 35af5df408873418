// Products of small tiles for dense attention: operands packed so that the inner loop reads memory in order.
//
// A strip is kStripRows rows of the left operand, a panel kPanel columns of the right one; a strip times a panel stays
// in registers from the first to the last term of its sums.
#pragma once

#include <type_traits>

#include "dsa/dense_attention.h"
#include "kernels/simd.h"

#if defined(__clang__)
#define DSA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define DSA_UNROLL _Pragma("GCC unroll 32")
#endif

namespace dsa::DSA_ISA {
namespace {

// As many sums as the registers hold along with a row of the panel and one factor.
#if defined(__AVX512F__)
constexpr int kStripRows = 14;
#elif defined(__AVX2__)
constexpr int kStripRows = 6;
#elif defined(__aarch64__)
constexpr int kStripRows = 8;
#else
constexpr int kStripRows = 4;
#endif
constexpr int kPanelVectors = 2;
constexpr int kPanel = kPanelVectors * kWidth;

// Keys that are packed at once, and the distance between rows of a strip of scores.
constexpr int64_t kBlockKeys = 128;

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// 2^x for x <= 0 to about 1.5 units in the last place: 0 below -126 (no subnormals) and for -infinity, NaN for NaN.
DSA_INLINE F32 exp2_of_negative(F32 x) {
    const F32 lowest = broadcast(-126.0f);
    const F32 clamped = max(lowest, x);
    const F32 power = round_even(clamped);
    const F32 r = clamped - power;
    F32 p = fma(broadcast(1.327647129e-3f), r, broadcast(9.675540961e-3f));
    p = fma(p, r, broadcast(5.550713092e-2f));
    p = fma(p, r, broadcast(2.402212024e-1f));
    p = fma(p, r, broadcast(6.931469440e-1f));
    p = fma(p, r, broadcast(1.000000119e+0f));
    return select_below(x, lowest, zero(), scale_by_power(p, power));
}

// c[kStripRows][kPanel] = a . b over `depth` terms, or factor[row] * c + a . b.
// a(row, term) = a[row * kRowStep + term * kTermStep]; b is a panel [depth][kPanel]; rows of c are c_step apart.
template <int64_t kRowStep, int64_t kTermStep, bool kAccumulate>
DSA_INLINE void multiply(const float* DSA_RESTRICT a, const float* DSA_RESTRICT b, int64_t depth,
                         float* DSA_RESTRICT c, int64_t c_step, const float* DSA_RESTRICT factor) {
    F32 sum[kStripRows][kPanelVectors];
    DSA_UNROLL
    for (int row = 0; row < kStripRows; ++row) {
        DSA_UNROLL
        for (int part = 0; part < kPanelVectors; ++part)
            sum[row][part] = kAccumulate ? load(c + row * c_step + part * kWidth) * broadcast(factor[row]) : zero();
    }
    for (int64_t term = 0; term < depth; ++term) {
        F32 right[kPanelVectors];
        DSA_UNROLL
        for (int part = 0; part < kPanelVectors; ++part) right[part] = load(b + term * kPanel + part * kWidth);
        DSA_UNROLL
        for (int row = 0; row < kStripRows; ++row) {
            const F32 left = broadcast(a[row * kRowStep + term * kTermStep]);
            DSA_UNROLL
            for (int part = 0; part < kPanelVectors; ++part) sum[row][part] = fma(left, right[part], sum[row][part]);
        }
    }
    DSA_UNROLL
    for (int row = 0; row < kStripRows; ++row) {
        DSA_UNROLL
        for (int part = 0; part < kPanelVectors; ++part) store(c + row * c_step + part * kWidth, sum[row][part]);
    }
}

// Rows of a matrix in memory: row i begins at `data + i * row_step`, its entries are `step` apart.
template <class T>
struct Rows {
    const T* data;
    int64_t row_step, step;
};

// Columns become rows: panels [columns of the strip or panel][kGroup of rows], zeros after the last row.
// out[(i / kGroup * columns + c) * kGroup + i % kGroup] = factor * row i, column c.
template <int kGroup, class T>
void pack_transposed(Rows<T> rows, int64_t count, int64_t columns, float factor, float* DSA_RESTRICT out) {
    for (int64_t first = 0; first < count; first += kGroup, out += columns * kGroup) {
        int64_t i = 0;
        const int64_t here = smaller<int64_t>(kGroup, count - first);
#if defined(__SSE2__)
        if constexpr (sizeof(T) == 4 && kGroup % 4 == 0) {
            for (; rows.step == 1 && i + 4 <= here; i += 4) {
                const float* row = rows.data + (first + i) * rows.row_step;
                const __m128 scale = _mm_set1_ps(factor);
                int64_t c = 0;
                for (; c + 4 <= columns; c += 4) {
                    __m128 r0 = _mm_loadu_ps(row + c), r1 = _mm_loadu_ps(row + rows.row_step + c);
                    __m128 r2 = _mm_loadu_ps(row + 2 * rows.row_step + c);
                    __m128 r3 = _mm_loadu_ps(row + 3 * rows.row_step + c);
                    _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
                    _mm_storeu_ps(out + c * kGroup + i, _mm_mul_ps(r0, scale));
                    _mm_storeu_ps(out + (c + 1) * kGroup + i, _mm_mul_ps(r1, scale));
                    _mm_storeu_ps(out + (c + 2) * kGroup + i, _mm_mul_ps(r2, scale));
                    _mm_storeu_ps(out + (c + 3) * kGroup + i, _mm_mul_ps(r3, scale));
                }
                for (; c < columns; ++c)
                    for (int64_t j = 0; j < 4; ++j) out[c * kGroup + i + j] = row[j * rows.row_step + c] * factor;
            }
        }
#endif
        for (; i < here; ++i) {
            const T* row = rows.data + (first + i) * rows.row_step;
            for (int64_t c = 0; c < columns; ++c) out[c * kGroup + i] = widen(row[c * rows.step]) * factor;
        }
        for (; i < kGroup; ++i)
            for (int64_t c = 0; c < columns; ++c) out[c * kGroup + i] = 0.0f;
    }
}

// Rows stay rows: panels [capacity][kPanel of columns], zeros after the last column. Returns whether every number
// is finite.
// out[(c / kPanel * capacity + i) * kPanel + c % kPanel] = row i, column c.
template <class T>
bool pack_rows(Rows<T> rows, int64_t count, int64_t columns, int64_t capacity, float* DSA_RESTRICT out) {
    F32 zeros = zero();
    for (int64_t i = 0; i < count; ++i) {
        const T* row = rows.data + i * rows.row_step;
        int64_t c = 0;
        for (; rows.step == 1 && c + kWidth <= columns; c += kWidth) {
            const F32 values = load(row + c);
            zeros = fma(values, zero(), zeros);
            store(out + (c / kPanel * capacity + i) * kPanel + c % kPanel, values);
        }
        float remaining = 0.0f;
        for (; c < columns; ++c) {
            const float value = widen(row[c * rows.step]);
            remaining += value * 0.0f;
            out[(c / kPanel * capacity + i) * kPanel + c % kPanel] = value;
        }
        for (; c % kPanel != 0; ++c) out[(c / kPanel * capacity + i) * kPanel + c % kPanel] = 0.0f;
        zeros += broadcast(remaining);
    }
    return reduce_add(zeros) == 0.0f;
}

// Cuts a worker's scratch memory into buffers; without memory it only counts.
struct Arena {
    char* base;
    int64_t used = 0;

    template <class T>
    T* take(int64_t count) {
        T* result = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return result;
    }
};

// What an operation on tensors [batch, tokens, heads, dims] needs to know, and where each query may look.
struct Shape {
    int64_t batch, tokens, keys, heads, groups, shared, dim, value_dim;
    const dsa_dense_attention_args* args;

    explicit Shape(const dsa_dense_attention_args& a)
        : batch(a.q.size[0]), tokens(a.q.size[1]), keys(a.k.size[1]), heads(a.q.size[2]), groups(a.k.size[2]),
          shared(heads / groups), dim(a.q.size[3]), value_dim(a.v.size[3]), args(&a) {}

    static int32_t at(const dsa_tensor& range, int64_t b, int64_t t) {
        return static_cast<const int32_t*>(range.data)[b * range.stride[0] + t * range.stride[1]];
    }

    // Visible keys [first, last); first == last where there are none.
    void visible(int64_t b, int64_t t, int64_t* first, int64_t* last) const {
        *first = args->key_start.data ? at(args->key_start, b, t) : 0;
        *last = larger(*first, args->key_end.data ? at(args->key_end, b, t) : larger<int64_t>(keys - tokens + t + 1, 0));
    }
};

// What queries are multiplied by when they are packed. Scores are in powers of two, but for a softcap: it is divided by
// afterwards, because its quotient with the scale may leave fp32 where scores and softcap do not.
DSA_INLINE float score_factor(const dsa_dense_attention_args& args) {
    return args.softcap != 0.0f ? args.scale : args.scale * kLog2E;
}

template <class T>
DSA_INLINE T* place(const dsa_tensor& tensor, int64_t i, int64_t j, int64_t k = 0) {
    return static_cast<T*>(tensor.data) + i * tensor.stride[0] + j * tensor.stride[1] + k * tensor.stride[2];
}

// `body` with a null pointer of the type that a tensor holds.
template <class Body>
DSA_INLINE void with_type(int32_t dtype, const Body& body) {
    switch (dtype) {
        case DSA_F32: return body(static_cast<float*>(nullptr));
        case DSA_BF16: return body(static_cast<Bf16*>(nullptr));
        case DSA_F16: return body(static_cast<F16*>(nullptr));
    }
}

template <class T>
DSA_INLINE Rows<T> token_rows(const dsa_tensor& tensor, int64_t b, int64_t token, int64_t head) {
    return {place<T>(tensor, b, token, head), tensor.stride[1], tensor.stride[3]};
}

// Writes one row of a result, factor * values; its last stride is 1.
DSA_INLINE void write_row(const dsa_tensor& tensor, int64_t b, int64_t token, int64_t head, const float* values,
                          F32 factor) {
    with_type(tensor.dtype, [&](auto* type) {
        auto* out = place<std::remove_pointer_t<decltype(type)>>(tensor, b, token, head);
        const int64_t dim = tensor.size[3];
        int64_t c = 0;
        for (; c + kWidth <= dim; c += kWidth) store(out + c, load(values + c) * factor);
        if (c < dim) store_partial(out + c, load(values + c) * factor, dim - c);
    });
}

// The rows of a tile: the query heads that share a KV head, of neighbouring tokens, row = token * shared + head.
// Writes the rows [first, first + count) of `tensor` as strips [dims][kStripRows], as `multiply` wants its left
// operand.
inline void pack_query_strips(const dsa_tensor& tensor, int64_t b, int64_t group, int64_t shared, int64_t first,
                              int64_t count, float factor, float* out) {
    const int64_t dim = tensor.size[3];
    with_type(tensor.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (int64_t i = 0; i < round_up(count, kStripRows); ++i) {
            float* to = out + i / kStripRows * dim * kStripRows + i % kStripRows;
            if (i >= count) {
                for (int64_t c = 0; c < dim; ++c) to[c * kStripRows] = 0.0f;
                continue;
            }
            const T* from = place<T>(tensor, b, (first + i) / shared, group * shared + (first + i) % shared);
            const int64_t step = tensor.stride[3];
            for (int64_t c = 0; c < dim; ++c) to[c * kStripRows] = widen(from[c * step]) * factor;
        }
    });
}

}  // namespace
}  // namespace dsa::DSA_ISA
