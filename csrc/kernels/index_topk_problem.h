// What index_topk is asked, how the work is cut, and how queries and keys are read.
//
// Shapes: B batch, T query tokens, S key tokens, Hi/Di index heads / index head dim, Gs selections of a query, K top-k.
#pragma once

#include "dsa/index_topk.h"

#include "kernels/e4m3.h"
#include "kernels/index_topk_bounds.h"
#include "kernels/index_topk_score.h"
#include "kernels/quantize_row.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int64_t kQueriesAtATime = 32;
// Packed keys of a tile: together with one query they fit the first cache.
constexpr int64_t kTileBytes = 16 << 10;
// One query alone uses a tile once, and keys come from memory while they are packed: in small tiles they go on coming
// while the last ones are scored.
constexpr int64_t kTileBytesOfOneQuery = 2 << 10;
// Outlines are made where there are so many times more keys than a query chooses, and where it takes no more than this
// share of the time for scores.
constexpr int64_t kLeastKeysOfBudget = 8;
constexpr double kMakingOfScoring = 0.05;
// Fewer keys than this are not worth another thread's candidates.
constexpr int64_t kLeastSegment = 4096;

// What a query sees, and what of that it chooses from.
struct Range {
    int64_t first, last;  // visible: [first, last)
    int64_t begin, end;   // without sinks and local tokens; empty where all that is visible is selected
};

class Problem {
  public:
    explicit Problem(const dsa_index_topk_args& args)
        : args(args),
          batch(args.query.size[0]),
          tokens(args.query.size[1]),
          heads(args.query.size[2]),
          dim(args.query.size[3]),
          keys(args.key.size[1]),
          selections(args.weight.dims == 4 ? args.weight.size[2] : 1),
          top_k(args.selection.size[args.selection.dims - 1]),
          wanted(top_k - args.sinks - args.local),
          quantised(args.key.dtype == DSA_I8),
          words(quantised ? Bytes::words(dim) : Floats::words(dim)),
          query_words(quantised ? words / Bytes::kWords * Bytes::kQueryWords : words),
          block(smaller<int64_t>(tokens, larger<int64_t>(1, kQueriesAtATime * 2048 / larger<int64_t>(2048, wanted)))),
          bounded(is_bounding_worth_it()),
          tile(larger<int64_t>(1, (block == 1 ? kTileBytesOfOneQuery : kTileBytes) / (words * 4 * kChunk)) * kChunk),
          blocks(block == 0 ? 0 : ceil_div(tokens, block)) {
        const int64_t items = batch * blocks;
        segments = 1;
        if (items > 0 && items < args.threads)
            segments = larger<int64_t>(1, smaller(ceil_div(2 * args.threads, items), keys / kLeastSegment));
    }

    Range range(int64_t b, int64_t t) const {
        Range r;
        r.first = args.key_start.data == nullptr ? 0 : at<int32_t>(args.key_start, b, t);
        r.last = args.key_end.data == nullptr ? larger<int64_t>(0, keys - tokens + t + 1)
                                              : at<int32_t>(args.key_end, b, t);
        const bool everything = r.last - r.first <= top_k;
        r.begin = everything ? 0 : r.first + args.sinks;
        r.end = everything ? 0 : r.last - args.local;
        return r;
    }

    int32_t* selection(int64_t b, int64_t t, int64_t s) const {
        return static_cast<int32_t*>(args.selection.data) + ((b * tokens + t) * selections + s) * top_k;
    }

    template <class T>
    static T at(const dsa_tensor& tensor, int64_t i, int64_t j) {
        return static_cast<const T*>(tensor.data)[i * tensor.stride[0] + j * tensor.stride[1]];
    }

    const dsa_index_topk_args& args;
    const int64_t batch, tokens, heads, dim, keys, selections, top_k;
    const int64_t wanted;  // how many a query chooses apart from sinks and local tokens
    const bool quantised;
    const int64_t words, query_words;  // of a key, and of a query's head
    const int64_t block;
    const bool bounded;  // whether outlines of all keys are made, for bounds
    const int64_t tile, blocks;
    int64_t segments;  // into which the keys of a block are split among threads

  private:
    // Whether finding a basis, which one thread does, and making outlines take little of the time that the scores do, and few
    // keys are selected. In cycles, roughly.
    bool is_bounding_worth_it() const {
        if (dim < kLeastOutlinedDim || dim > kMostOutlinedDim || keys < kLeastKeysOfBudget * wanted) return false;
        const double d = static_cast<double>(dim), queries = static_cast<double>(batch * tokens);
        const double making = 60.0 * d * d * d * larger(args.threads, 1) + static_cast<double>(batch * keys) * d * d / 4.0;
        const double scoring = queries * static_cast<double>(keys * heads) * d / 20.0;
        return making < kMakingOfScoring * scoring;
    }
};

bool fit(const Problem& p, const dsa_tensor& bound) {
    if (bound.data == nullptr) return true;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t t = 0; t < p.tokens; ++t) {
            const int32_t value = Problem::at<int32_t>(bound, b, t);
            if (value < 0 || value > p.keys) return false;
        }
    return true;
}

float weight_of(const Problem& p, int64_t b, int64_t t, int64_t s, int64_t head) {
    const dsa_tensor& w = p.args.weight;
    const int64_t selection = w.dims == 4 ? s * w.stride[2] : 0;
    const int64_t offset = b * w.stride[0] + t * w.stride[1] + selection + head * w.stride[w.dims - 1];
    switch (w.dtype) {
        case DSA_BF16: return widen(static_cast<const Bf16*>(w.data)[offset]);
        case DSA_F16: return widen(static_cast<const F16*>(w.data)[offset]);
    }
    return static_cast<const float*>(w.data)[offset];
}

void widen_query(const Problem& p, int64_t b, int64_t t, int64_t head, float* row) {
    const dsa_tensor& q = p.args.query;
    const int64_t offset = b * q.stride[0] + t * q.stride[1] + head * q.stride[2];
    switch (q.dtype) {
        case DSA_F32: return widen_row(static_cast<const float*>(q.data) + offset, q.stride[3], p.dim, row);
        case DSA_BF16: return widen_row(static_cast<const Bf16*>(q.data) + offset, q.stride[3], p.dim, row);
        case DSA_F16: return widen_row(static_cast<const F16*>(q.data) + offset, q.stride[3], p.dim, row);
    }
}

// Head `head` of a query as it is scored: its numbers in `row` and, where keys are quantised, in `bytes`. Returns the scale of
// the numbers.
float read_query(const Problem& p, int64_t b, int64_t t, int64_t head, float* row, int8_t* bytes) {
    widen_query(p, b, t, head, row);
    if (!p.quantised) return 1.0f;
    const float scale = quantize_row(row, p.dim, kQueryLevels, bytes);
    for (int64_t i = 0; i < p.dim; ++i) row[i] = bytes[i];
    return scale;
}

// What the product of a head, whose numbers have this scale, is multiplied by in selection `s`.
float factor_of(const Problem& p, int64_t b, int64_t t, int64_t s, int64_t head, float scale) {
    return (weight_of(p, b, t, s, head) * scale) * p.args.scale;
}

// A key's numbers, and what they are multiplied by.
float read_key(const Problem& p, int64_t b, int64_t s, float* row) {
    const dsa_tensor& k = p.args.key;
    const int64_t offset = b * k.stride[0] + s * k.stride[1];
    const float scale = p.args.key_scale.data == nullptr ? 1.0f : Problem::at<float>(p.args.key_scale, b, s);
    switch (k.dtype) {
        case DSA_I8:
            for (int64_t i = 0; i < p.dim; ++i) row[i] = static_cast<const int8_t*>(k.data)[offset + i * k.stride[2]];
            return scale;
        case DSA_E4M3:
            decode_e4m3(static_cast<const uint8_t*>(k.data) + offset, k.stride[2], p.dim, scale, row);
            return 1.0f;
        case DSA_F32: widen_row(static_cast<const float*>(k.data) + offset, k.stride[2], p.dim, row); break;
        case DSA_BF16: widen_row(static_cast<const Bf16*>(k.data) + offset, k.stride[2], p.dim, row); break;
        case DSA_F16: widen_row(static_cast<const F16*>(k.data) + offset, k.stride[2], p.dim, row); break;
    }
    return scale;
}

}  // namespace
}  // namespace dsa::DSA_ISA
