// One query a sequence: keys and values are read once, in the order they lie in memory, and never packed.
//
// All heads advance together through the keys, because a token's heads lie side by side. The loops are arranged so
// that a loaded key or value serves two query heads of its group, and a loaded sum takes several values. Four heads at a
// time, which AVX-512 has the registers for, are slower: while the second pair reads from the first cache, what was asked
// for ahead arrives.
#pragma once

#include "common/isa.h"
#include "kernels/dense_attention_tiles.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int64_t kStreamKeys = 64;
constexpr int64_t kAheadBytes = 32 << 10;
constexpr int kValuesAtOnce = 4;

// dots[row * kStreamKeys + j] = q row . key j for four keys; q rows are `dim` apart.
template <int kRows, class T>
DSA_INLINE void four_dots(const float* DSA_RESTRICT q, const T* const* keys, int64_t dim, float* DSA_RESTRICT dots) {
    F32 sum[kRows][4];
    DSA_UNROLL
    for (int row = 0; row < kRows; ++row) {
        DSA_UNROLL
        for (int j = 0; j < 4; ++j) sum[row][j] = zero();
    }
    for (int64_t c = 0; c < dim; c += kWidth) {
        F32 left[kRows];
        DSA_UNROLL
        for (int row = 0; row < kRows; ++row) left[row] = load(q + row * dim + c);
        DSA_UNROLL
        for (int j = 0; j < 4; ++j) {
            const F32 key = load(keys[j] + c);
            DSA_UNROLL
            for (int row = 0; row < kRows; ++row) sum[row][j] = fma(left[row], key, sum[row][j]);
        }
    }
    DSA_UNROLL
    for (int row = 0; row < kRows; ++row) {
#if defined(__AVX2__)
        __m256 half[4];
        DSA_UNROLL
        for (int j = 0; j < 4; ++j) {
#if defined(__AVX512F__)
            half[j] = _mm256_add_ps(_mm512_castps512_ps256(sum[row][j].v), _mm512_extractf32x8_ps(sum[row][j].v, 1));
#else
            half[j] = sum[row][j].v;
#endif
        }
        const __m256 quarters = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
        _mm_storeu_ps(dots + row * kStreamKeys, lower_half_sum(quarters));
#else
        for (int j = 0; j < 4; ++j) dots[row * kStreamKeys + j] = reduce_add(sum[row][j]);
#endif
    }
}

// sum[row][c] += weight[row][j] * value j [c] over kValues values; weights are kStreamKeys apart, sums `sum_step`.
template <int kRows, int kValues, class T>
DSA_INLINE void add_values(const float* weights, const T* const* values, int64_t dim, float* DSA_RESTRICT sum,
                           int64_t sum_step) {
    F32 factor[kRows][kValues];
    DSA_UNROLL
    for (int row = 0; row < kRows; ++row) {
        DSA_UNROLL
        for (int j = 0; j < kValues; ++j) factor[row][j] = broadcast(weights[row * kStreamKeys + j]);
    }
    for (int64_t c = 0; c < dim; c += kWidth) {
        F32 total[kRows];
        DSA_UNROLL
        for (int row = 0; row < kRows; ++row) total[row] = load(sum + row * sum_step + c);
        DSA_UNROLL
        for (int j = 0; j < kValues; ++j) {
            const F32 value = load(values[j] + c);
            DSA_UNROLL
            for (int row = 0; row < kRows; ++row) total[row] = fma(factor[row][j], value, total[row]);
        }
        DSA_UNROLL
        for (int row = 0; row < kRows; ++row) store(sum + row * sum_step + c, total[row]);
    }
}

// What one pass over some keys leaves, per row: the largest score and the sum of weights, both in powers of two, and
// the weighted sum of values.
struct Partial {
    float *top, *total, *sum;
    int64_t sum_step;
};

// Turns a row of scores into weights relative to the largest score so far, and returns by what earlier sums shrink.
// `count` is a multiple of kWidth; what must not count is -infinity.
DSA_INLINE float weigh(float* DSA_RESTRICT scores, int64_t count, float* top, float* total) {
    F32 highest = broadcast(*top);
    for (int64_t j = 0; j < count; j += kWidth) highest = max(load(scores + j), highest);
    const float now = reduce_max(highest);
    const float base = now == -INFINITY ? 0.0f : now;
    F32 sum = zero();
    const F32 shift = broadcast(base);
    for (int64_t j = 0; j < count; j += kWidth) {
        const F32 weight = exp2_of_negative(load(scores + j) - shift);
        store(scores + j, weight);
        sum += weight;
    }
    const float shrink = *top == now ? 1.0f : exp2f(*top - base);
    *total = *total * shrink + reduce_add(sum);
    *top = now;
    return shrink;
}

// From scores as they are to capped ones in powers of two.
DSA_INLINE void cap_scores(float* scores, int64_t count, float softcap) {
    const F32 divisor = broadcast(softcap), cap = broadcast(softcap * kLog2E);
    for (int64_t j = 0; j < count; j += kWidth) store(scores + j, cap * tanh(load(scores + j) / divisor));
}

// Asks for the rows of a cache that are read soon, in the order in which they lie in memory if that is token by token.
// The processor's own prefetching stops at each page, and a token's keys may fill one.
template <class T>
class Ahead {
  public:
    Ahead(const dsa_tensor& tensor, int64_t b, int64_t token, int64_t last)
        : tensor_(tensor), b_(b), last_(last) {
        const int64_t row = tensor.size[2] * tensor.size[3] * static_cast<int64_t>(sizeof(T));
        token_ = prefetches_alone() ? last : token + kAheadBytes / row;
    }

    DSA_INLINE void fetch(int64_t rows) {
        for (; rows > 0 && token_ < last_; --rows) {
            const T* row = place<T>(tensor_, b_, token_, head_);
            for (int64_t c = 0; c < tensor_.size[3]; c += 64 / static_cast<int64_t>(sizeof(T)))
                __builtin_prefetch(row + c);
            if (++head_ == tensor_.size[2]) {
                head_ = 0;
                ++token_;
            }
        }
    }

  private:
    const dsa_tensor& tensor_;
    int64_t b_, last_, token_, head_ = 0;
};

// Adds the keys [first, last) of batch row b to `part`, whose rows are the H heads. `scores` holds H x kStreamKeys.
template <class Key, class Value>
void stream_keys(const Shape& shape, int64_t b, int64_t first, int64_t last, const float* q, float* scores,
                 float softcap, const Partial& part) {
    const dsa_tensor &k = shape.args->k, &v = shape.args->v;
    const int64_t dim = shape.dim, value_dim = shape.value_dim, shared = shape.shared;
    Ahead<Key> next_keys(k, b, first, last);
    Ahead<Value> next_values(v, b, first, last);
    for (int64_t block = first; block < last; block += kStreamKeys) {
        const int64_t count = smaller(kStreamKeys, last - block);
        for (int64_t j = 0; j < count; j += 4) {
            for (int64_t group = 0; group < shape.groups; ++group) {
                const Key* keys[4];
                for (int i = 0; i < 4; ++i) keys[i] = place<Key>(k, b, block + smaller(j + i, count - 1), group);
                next_keys.fetch(4);
                const float* rows = q + group * shared * dim;
                float* dots = scores + group * shared * kStreamKeys + j;
                for (int64_t row = 0; row < shared;) {
                    const int64_t left = shared - row;
                    if (left == 3) {
                        four_dots<3>(rows + row * dim, keys, dim, dots + row * kStreamKeys);
                        row += 3;
                    } else if (left >= 2) {
                        four_dots<2>(rows + row * dim, keys, dim, dots + row * kStreamKeys);
                        row += 2;
                    } else {
                        four_dots<1>(rows + row * dim, keys, dim, dots + row * kStreamKeys);
                        row += 1;
                    }
                }
            }
        }
        const int64_t padded = round_up(count, kWidth);
        for (int64_t head = 0; head < shape.heads; ++head) {
            float* row = scores + head * kStreamKeys;
            if (softcap != 0.0f) cap_scores(row, padded, softcap);
            for (int64_t j = count; j < padded; ++j) row[j] = -INFINITY;
            const float shrink = weigh(row, padded, part.top + head, part.total + head);
            float* sum = part.sum + head * part.sum_step;
            if (shrink == 1.0f) continue;
            for (int64_t c = 0; c < value_dim; c += kWidth) store(sum + c, load(sum + c) * broadcast(shrink));
        }
        int64_t j = 0;
        for (; j + kValuesAtOnce <= count; j += kValuesAtOnce) {
            for (int64_t head = 0; head < shape.heads;) {
                const Value* values[kValuesAtOnce];
                for (int i = 0; i < kValuesAtOnce; ++i) values[i] = place<Value>(v, b, block + j + i, head / shared);
                next_values.fetch(kValuesAtOnce);
                for (const int64_t end = head + shared; head < end;) {
                    const float* weights = scores + head * kStreamKeys + j;
                    float* sum = part.sum + head * part.sum_step;
                    if (end - head >= 2) {
                        add_values<2, kValuesAtOnce>(weights, values, value_dim, sum, part.sum_step);
                        head += 2;
                    } else {
                        add_values<1, kValuesAtOnce>(weights, values, value_dim, sum, part.sum_step);
                        head += 1;
                    }
                }
            }
        }
        for (; j < count; ++j) {
            for (int64_t head = 0; head < shape.heads; ++head) {
                const Value* value = place<Value>(v, b, block + j, head / shared);
                add_values<1, 1>(scores + head * kStreamKeys + j, &value, value_dim, part.sum + head * part.sum_step,
                                 part.sum_step);
            }
        }
    }
}

}  // namespace
}  // namespace dsa::DSA_ISA
