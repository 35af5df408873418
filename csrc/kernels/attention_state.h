// What one query keeps between tiles of its selected tokens, for every attention that reads them tile by tile.
//
// Shapes: H heads, D/Dv head dims of keys / values.
#pragma once

#include "kernels/sparse_attention_tile.h"

namespace dsa::DSA_ISA {
namespace {

// One call on one thread costs less than waking another, below this many multiply-adds.
constexpr double kSerialWork = 400e3;
// Queries that are too few to be shared among threads are cut into pieces of this many places.
constexpr int64_t kPiecePlaces = 128;
constexpr int64_t kPieces = 64;

// Pieces that each query's places are cut into. Depends on the shape alone, so that the result does not depend on the number
// of threads.
DSA_INLINE int64_t pieces_of_query(int64_t places, int64_t queries) {
    return smaller(larger<int64_t>(ceil_div(places, kPiecePlaces), 1), larger<int64_t>(kPieces / queries, 1));
}

struct StateShape {
    int64_t heads, padded_dim, padded_value_dim, floats;

    StateShape(int64_t heads, int64_t dim, int64_t value_dim)
        : heads(heads),
          padded_dim(round_up(dim, kWidth)),
          padded_value_dim(round_up(value_dim, kWidth)),
          floats(round_up(heads * (padded_dim + padded_value_dim + 2), 16)) {}
};

// The query's packed heads, and for each head the weighted sum of values, the largest score and the sum of the weights,
// which are relative to it.
struct State {
    float *q, *mixed, *top, *total;

    State(const StateShape& shape, float* floats)
        : q(floats),
          mixed(q + shape.heads * shape.padded_dim),
          top(mixed + shape.heads * shape.padded_value_dim),
          total(top + shape.heads) {}

    // Packs the heads of token t of `x` [B, T, H, D], times `scale`, with nothing read yet.
    void begin(const StateShape& shape, const dsa_tensor& x, int64_t b, int64_t t, float scale) {
        pack_heads(x, b, t, scale, q);
        memset(mixed, 0, static_cast<size_t>(shape.heads * shape.padded_value_dim) * 4);
        for (int64_t h = 0; h < shape.heads; ++h) top[h] = -INFINITY, total[h] = 0.0f;
    }

    // Adds the sums of another piece of the same query's places.
    void merge(const StateShape& shape, const State& other) {
        for (int64_t h = 0; h < shape.heads; ++h) {
            const float highest = larger(top[h], other.top[h]), origin = finite_or_zero(highest);
            const float mine = expf(top[h] - origin), theirs = expf(other.top[h] - origin);
            top[h] = highest;
            total[h] = total[h] * mine + other.total[h] * theirs;
            float* sums = mixed + h * shape.padded_value_dim;
            const float* more = other.mixed + h * shape.padded_value_dim;
            const F32 a = broadcast(mine), b = broadcast(theirs);
            for (int64_t i = 0; i < shape.padded_value_dim; i += kWidth)
                store(sums + i, fma(load(more + i), b, load(sums + i) * a));
        }
    }

    // Writes token t of `out` [B, T, H, Dv] and `lse` [B, T, H]; `sink` is [H], or absent.
    void finish(const StateShape& shape, const dsa_tensor& out, const dsa_tensor& lse, const dsa_tensor& sink, int64_t b,
                int64_t t) {
        for (int64_t h = 0; h < shape.heads; ++h) {
            const float origin = finite_or_zero(top[h]);
            float sum = total[h];
            // Where something is seen the sum is at least 1; where nothing is, what was mixed is zero, whatever the sink.
            const bool seen = sum != 0.0f;
            static_cast<float*>(lse.data)[b * lse.stride[0] + t * lse.stride[1] + h * lse.stride[2]] = logf(sum) + origin;
            if (sink.data) sum += expf(element(sink, h * sink.stride[0]) - origin);
            const F32 divisor = broadcast(seen ? sum : 1.0f);
            float* row = mixed + h * shape.padded_value_dim;
            for (int64_t i = 0; i < shape.padded_value_dim; i += kWidth) store(row + i, load(row + i) / divisor);
            store_row(out, b * out.stride[0] + t * out.stride[1] + h * out.stride[2], out.size[3], row);
        }
    }
};

}  // namespace
}  // namespace dsa::DSA_ISA
