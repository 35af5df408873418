// What sparse attention does with one tile of selected tokens: find the rows, multiply queries by them, and mix them.
//
// The rows are read where they lie, once for up to kRowsAtOnce query heads that share them; nothing is gathered into a
// buffer. Lanes run along the head dim, because there one token is contiguous.
#pragma once

#include "kernels/simd.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int kTileKeys = 64;

// How many query heads one pass over the rows serves: what the registers hold in addition to the rows.
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 4;
#else
constexpr int kRowsAtOnce = 3;
#endif
constexpr int kVectorsAtOnce = 4;

template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};

// Query heads of the next pass, evenly split over the passes that are left.
DSA_INLINE int rows_of_pass(int64_t left) {
    return static_cast<int>(ceil_div(left, ceil_div(left, kRowsAtOnce)));
}

// Loads once and for all: compilers would rather load again at every use, and loads are what runs out first.
DSA_INLINE F32 in_register(F32 a) {
#if defined(__x86_64__)
    asm("" : "+v"(a.v));
#endif
    return a;
}

// The rows of one head that `index` names: `stride` bytes apart, token 0 at `base`. None where `index` is absent.
struct Rows {
    const char* base;
    int64_t stride;
    const int32_t* index;

    DSA_INLINE const char* at(int64_t i) const { return base + index[i] * stride; }
};

// Writes the positions among `places` indices that lie in [0, keys) to `rows`, in order, and returns how many. Up to the
// next multiple of the vector width the first one follows again, so that whole vectors of keys can be computed.
// `outside` becomes true when an index is neither of them nor -1.
DSA_INLINE int select_places(const int32_t* DSA_RESTRICT indices, int places, int64_t keys, int32_t* DSA_RESTRICT rows,
                             bool* outside) {
    const uint32_t limit = static_cast<uint32_t>(keys);
    uint32_t skipped = 0;
    for (int i = 0; i < places; ++i) {
        rows[i] = indices[i];
        skipped |= static_cast<uint32_t>(indices[i]) >= limit;
    }
    int count = places;
    if (skipped) {
        count = 0;
        for (int i = 0; i < places; ++i) {
            const int32_t index = indices[i];
            if (index < -1 || index >= keys) *outside = true;
            rows[count] = index;
            count += static_cast<uint32_t>(index) < limit;
        }
    }
    if (count > 0)
        for (int i = count; i % kWidth != 0; ++i) rows[i] = rows[0];
    return count;
}

// Asks for a row of a tile to come, and perhaps for the line after it: two lines a round, because a branch for each costs
// more than asking.
DSA_INLINE void prefetch_row(const char* row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 128) {
        __builtin_prefetch(row + at, 0, 2);
        __builtin_prefetch(row + at + 64, 0, 2);
    }
}

// Sums of four vectors, lane by lane within each 128 bits: the sum over those groups of four lanes is left to do.
DSA_INLINE F32 sums_of_four(F32 a, F32 b, F32 c, F32 d) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    return {_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee))};
#elif defined(__AVX2__)
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
    return {_mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee))};
#else
    const Native ab = Native{a.v[0], b.v[0], a.v[1], b.v[1]} + Native{a.v[2], b.v[2], a.v[3], b.v[3]};
    const Native cd = Native{c.v[0], d.v[0], c.v[1], d.v[1]} + Native{c.v[2], d.v[2], c.v[3], d.v[3]};
    return {Native{ab[0], ab[1], cd[0], cd[1]} + Native{ab[2], ab[3], cd[2], cd[3]}};
#endif
}

// The sums of kWidth vectors, one a lane, from their sums in groups of four.
DSA_INLINE F32 join_sums(const F32 (&part)[kWidth / 4]) {
#if defined(__AVX512F__)
    const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(part[0].v, part[1].v, 0x88),
                                     _mm512_shuffle_f32x4(part[0].v, part[1].v, 0xdd));
    const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(part[2].v, part[3].v, 0x88),
                                      _mm512_shuffle_f32x4(part[2].v, part[3].v, 0xdd));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
#elif defined(__AVX2__)
    return {_mm256_add_ps(_mm256_permute2f128_ps(part[0].v, part[1].v, 0x20),
                          _mm256_permute2f128_ps(part[0].v, part[1].v, 0x31))};
#else
    return part[0];
#endif
}

// out[r][i] = q[r] . rows[i], for i up to the next multiple of kWidth. `q` is padded with zeros to whole vectors.
template <int kRows, class T>
void dot_rows(const float* q, int64_t q_stride, Rows rows, int keys, int64_t dim, float* out, int64_t out_stride,
              Rows ahead) {
    const int64_t whole = dim / kWidth * kWidth;
    for (int first = 0; first < keys; first += kWidth) {
        F32 part[kRows][kWidth / 4];
        for (int quad = 0; quad < kWidth / 4; ++quad) {
            const int key = first + 4 * quad;
            const T* const row[4] = {
                reinterpret_cast<const T*>(rows.at(key)), reinterpret_cast<const T*>(rows.at(key + 1)),
                reinterpret_cast<const T*>(rows.at(key + 2)), reinterpret_cast<const T*>(rows.at(key + 3))};
            if (ahead.index)
                for (int i = 0; i < 4; ++i) prefetch_row(ahead.at(key + i), dim * static_cast<int64_t>(sizeof(T)));
            F32 sum[kRows][4];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) sum[r][i] = zero();
            for (int64_t d = 0; d < whole; d += kWidth) {
                F32 query[kRows];
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) query[r] = in_register(load(q + r * q_stride + d));
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const F32 x = in_register(load(row[i] + d));
#pragma GCC unroll 4
                    for (int r = 0; r < kRows; ++r) sum[r][i] = fma(query[r], x, sum[r][i]);
                }
            }
            if (whole < dim) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const F32 x = load_partial(row[i] + whole, dim - whole);
#pragma GCC unroll 4
                    for (int r = 0; r < kRows; ++r) sum[r][i] = fma(load(q + r * q_stride + whole), x, sum[r][i]);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) part[r][quad] = sums_of_four(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) store(out + r * out_stride + first, join_sums(part[r]));
    }
}

// Columns [column, column + kVectors * kWidth) of total[r] = correction[r] * total[r] + sum_i weights[r][i] * rows[i].
// `tail` lanes of the last vector are there, if kTail; the rows of `total` are padded to whole vectors. Rows [asked,
// asked_end) of `ahead`, `bytes` long, are asked for.
template <int kRows, int kVectors, bool kTail, class T>
DSA_INLINE void mix_columns(const float* weights, int64_t weight_stride, Rows rows, int keys, int64_t column, int64_t tail,
                            const float* correction, float* total, int64_t total_stride, Rows ahead, int asked,
                            int asked_end, int64_t bytes) {
    F32 sum[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c)
            sum[r][c] = broadcast(correction[r]) * load(total + r * total_stride + column + c * kWidth);
    for (int i = 0; i < keys; ++i) {
        const T* row = reinterpret_cast<const T*>(rows.at(i)) + column;
        if (i >= asked && i < asked_end) prefetch_row(ahead.at(i), bytes);
        F32 weight[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) weight[r] = in_register(broadcast(weights[r * weight_stride + i]));
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) {
            const F32 x = in_register(kTail && c == kVectors - 1 ? load_partial(row + c * kWidth, tail) : load(row + c * kWidth));
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) sum[r][c] = fma(weight[r], x, sum[r][c]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) store(total + r * total_stride + column + c * kWidth, sum[r][c]);
}

// All columns. Each pass over the rows asks for a share of those to come.
template <int kRows, class T>
void mix_rows(const float* weights, int64_t weight_stride, Rows rows, int keys, int64_t dim, const float* correction,
              float* total, int64_t total_stride, Rows ahead) {
    int64_t column = 0;
    int asked = 0;
    const auto columns = [&](auto vectors, auto has_tail, int64_t tail) {
        constexpr int kVectors = decltype(vectors)::value;
        const int64_t begin = column;
        column += kVectors * kWidth;
        const int asked_end = ahead.index ? static_cast<int>(smaller(column, dim) * keys / dim) : 0;
        mix_columns<kRows, kVectors, decltype(has_tail)::value, T>(weights, weight_stride, rows, keys, begin, tail,
                                                                   correction, total, total_stride, ahead, asked,
                                                                   asked_end, dim * static_cast<int64_t>(sizeof(T)));
        asked = asked_end;
    };
    while (dim - column >= kVectorsAtOnce * kWidth) columns(Constant<kVectorsAtOnce>{}, Constant<0>{}, 0);
    while (dim - column >= kWidth) columns(Constant<1>{}, Constant<0>{}, 0);
    if (column < dim) columns(Constant<1>{}, Constant<1>{}, dim - column);
}

// dot_rows and mix_rows for rows of one dtype, by the number of query heads.
struct RowKernels {
    using Dot = void (*)(const float*, int64_t, Rows, int, int64_t, float*, int64_t, Rows);
    using Mix = void (*)(const float*, int64_t, Rows, int, int64_t, const float*, float*, int64_t, Rows);
    Dot dot[kRowsAtOnce + 1];
    Mix mix[kRowsAtOnce + 1];
};

template <class T>
constexpr RowKernels row_kernels() {
#if defined(__AVX512F__)
    return {{nullptr, dot_rows<1, T>, dot_rows<2, T>, dot_rows<3, T>, dot_rows<4, T>},
            {nullptr, mix_rows<1, T>, mix_rows<2, T>, mix_rows<3, T>, mix_rows<4, T>}};
#else
    return {{nullptr, dot_rows<1, T>, dot_rows<2, T>, dot_rows<3, T>},
            {nullptr, mix_rows<1, T>, mix_rows<2, T>, mix_rows<3, T>}};
#endif
}

constexpr RowKernels kRowKernels[] = {row_kernels<float>(), row_kernels<Bf16>(), row_kernels<F16>()};

DSA_INLINE float finite_or_zero(float top) { return top == -INFINITY ? 0.0f : top; }

// Turns the scores of a tile into weights relative to the largest score so far. Returns the factor that makes earlier
// weights so. A score of NaN or +infinity makes the weights and their sum NaN, as a softmax does.
DSA_INLINE float weigh(float* scores, int keys, float softcap, float* top, float* total) {
    const int padded = static_cast<int>(round_up(keys, kWidth));
    F32 best = broadcast(-INFINITY);
    if (softcap != 0.0f) {
        const F32 cap = broadcast(softcap);
        for (int i = 0; i < padded; i += kWidth) store(scores + i, cap * tanh(load(scores + i) / cap));
    }
    for (int i = keys; i < padded; ++i) scores[i] = -INFINITY;
    for (int i = 0; i < padded; i += kWidth) best = max(load(scores + i), best);
    const float before = *top, now = larger(before, reduce_max(best));
    const F32 origin = broadcast(finite_or_zero(now));
    F32 sum = zero();
    for (int i = 0; i < padded; i += kWidth) {
        const F32 weight = exp(load(scores + i) - origin);
        store(scores + i, weight);
        sum += weight;
    }
    float correction = 1.0f;
    if (now != before) {
        float lanes[kWidth];
        store(lanes, exp(broadcast(before) - origin));
        correction = lanes[0];
    }
    *top = now;
    *total = *total * correction + reduce_add(sum);
    return correction;
}

// A row of any dtype and stride in fp32, times `factor`, padded with zeros to whole vectors.
template <class T>
DSA_INLINE void pack_row(const T* p, int64_t stride, int64_t dim, float factor, float* DSA_RESTRICT row) {
    for (int64_t i = 0; i < dim; ++i) row[i] = widen(p[i * stride]) * factor;
    for (int64_t i = dim; i % kWidth != 0; ++i) row[i] = 0.0f;
}

// The heads of one token of `x` [B, T, H, D], packed one after the other.
DSA_INLINE void pack_heads(const dsa_tensor& x, int64_t b, int64_t t, float factor, float* DSA_RESTRICT rows) {
    const int64_t dim = x.size[3], padded = round_up(dim, kWidth);
    const auto heads = [&](auto* p) {
        p += b * x.stride[0] + t * x.stride[1];
        for (int64_t h = 0; h < x.size[2]; ++h) pack_row(p + h * x.stride[2], x.stride[3], dim, factor, rows + h * padded);
    };
    switch (x.dtype) {
        case DSA_F32: return heads(static_cast<const float*>(x.data));
        case DSA_BF16: return heads(static_cast<const Bf16*>(x.data));
        case DSA_F16: return heads(static_cast<const F16*>(x.data));
    }
}

// Writes a row of `dim` values in the dtype of `x`, at `offset` elements; the values are padded to whole vectors.
DSA_INLINE void store_row(const dsa_tensor& x, int64_t offset, int64_t dim, const float* row) {
    const auto write = [&](auto* p) {
        int64_t i = 0;
        for (p += offset; i + kWidth <= dim; i += kWidth) store(p + i, load(row + i));
        if (i < dim) store_partial(p + i, load(row + i), dim - i);
    };
    switch (x.dtype) {
        case DSA_F32: return write(static_cast<float*>(x.data));
        case DSA_BF16: return write(static_cast<Bf16*>(x.data));
        case DSA_F16: return write(static_cast<F16*>(x.data));
    }
}

DSA_INLINE float element(const dsa_tensor& x, int64_t offset) {
    switch (x.dtype) {
        case DSA_BF16: return widen(static_cast<const Bf16*>(x.data)[offset]);
        case DSA_F16: return widen(static_cast<const F16*>(x.data)[offset]);
        default: return static_cast<const float*>(x.data)[offset];
    }
}

DSA_INLINE int64_t bytes_of(int32_t dtype) { return dtype == DSA_F32 ? 4 : 2; }

// The rows of KV head `g` of `x` [B, S, G, D] that `index` names.
DSA_INLINE Rows head_rows(const dsa_tensor& x, int64_t b, int64_t g, const int32_t* index) {
    const int64_t bytes = bytes_of(x.dtype);
    return {static_cast<const char*>(x.data) + (b * x.stride[0] + g * x.stride[2]) * bytes, x.stride[1] * bytes, index};
}

}  // namespace
}  // namespace dsa::DSA_ISA
