// Scores of a tile of keys for one query. The keys lie interleaved, one key a lane, so that no sum runs across lanes
// and the order of every sum is the same wherever a key lies: a tile is packed once and serves a block of queries.
//
// Shapes: Hi/Di index heads / index head dim; a `word` is 32 bits of one key or query, kDimsInLane bytes or one float.
#pragma once

#include "kernels/index_topk_candidates.h"

namespace dsa::DSA_ISA {
namespace {

// Keys of one tile, the newest first.
struct Tile {
    const int32_t* words;  // [keys / kWidth, words of a key, kWidth]
    const float* scale;    // [keys], where keys are quantised
    int64_t newest;        // position of the first
};

// One query: `[Hi, words of a key]`, the factor of each head, and what each head's sum starts from.
struct Query {
    const int32_t* words;
    const float* factor;
    const int32_t* start;
};

// Index keys in eight bits: integers, with one scale a key.
struct Bytes {
    static constexpr bool kScaled = true;
    using Sum = I32;
    static int64_t words(int64_t dim) { return ceil_div(dim, kDimsInLane); }
    DSA_INLINE static Sum start(int32_t value) { return broadcast(value); }
    DSA_INLINE static Sum key(const int32_t* words) { return load(words); }
    DSA_INLINE static Sum query(int32_t word) { return broadcast(word); }
    DSA_INLINE static Sum add(Sum sum, Sum key, Sum query) { return dot(sum, key, query); }
    DSA_INLINE static F32 relu(Sum sum) { return to_float(max(sum, broadcast(0))); }
};

// Floating keys, widened to fp32.
struct Floats {
    static constexpr bool kScaled = false;
    using Sum = F32;
    static int64_t words(int64_t dim) { return dim; }
    DSA_INLINE static Sum start(int32_t) { return zero(); }
    DSA_INLINE static Sum key(const int32_t* words) { return load(reinterpret_cast<const float*>(words)); }
    DSA_INLINE static Sum query(int32_t word) { return broadcast(from_bits(static_cast<uint32_t>(word))); }
    DSA_INLINE static Sum add(Sum sum, Sum key, Sum query) { return fma(key, query, sum); }
    // The second operand where one is NaN: an unknown product stays unknown.
    DSA_INLINE static F32 relu(Sum sum) { return max(zero(), sum); }
};

// Adds `kHeads` heads to the scores of kChunk keys.
template <class Keys, int kHeads>
DSA_INLINE void add_heads(const int32_t* DSA_RESTRICT keys, int64_t words, const Query& query, int64_t head,
                          F32* DSA_RESTRICT scores) {
    const int32_t* DSA_RESTRICT from = query.words + head * words;
    typename Keys::Sum sum[kHeads][kVectors];
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
        const typename Keys::Sum start = Keys::start(query.start[head + h]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[h][v] = start;
    }
    for (int64_t word = 0; word < words; ++word) {
        typename Keys::Sum key[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) key[v] = Keys::key(keys + (v * words + word) * kWidth);
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
            const typename Keys::Sum of_query = Keys::query(from[h * words + word]);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[h][v] = Keys::add(sum[h][v], key[v], of_query);
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
        const F32 factor = broadcast(query.factor[head + h]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) scores[v] = scores[v] + Keys::relu(sum[h][v]) * factor;
    }
}

// Scores the keys [begin, end) of a tile and hands those that beat the threshold to `best`.
template <class Keys>
void scan_tile(const Tile& tile, int64_t begin, int64_t end, int64_t words, int64_t heads, const Query& query,
               Candidates& best) {
    for (int64_t at = begin / kChunk * kChunk; at < end; at += kChunk) {
        const int32_t* keys = tile.words + at * words;
        F32 scores[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) scores[v] = zero();
        int64_t head = 0;
        for (; head + 4 <= heads; head += 4) add_heads<Keys, 4>(keys, words, query, head, scores);
        if (heads - head == 3) add_heads<Keys, 3>(keys, words, query, head, scores);
        if (heads - head == 2) add_heads<Keys, 2>(keys, words, query, head, scores);
        if (heads - head == 1) add_heads<Keys, 1>(keys, words, query, head, scores);
        const F32 threshold = broadcast(best.threshold());
        uint64_t chosen = best.everything();
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            if (Keys::kScaled) scores[v] = scores[v] * load(tile.scale + at + v * kWidth);
            chosen |= static_cast<uint64_t>(above(scores[v], threshold)) << (v * kWidth);
        }
        if (at < begin) chosen &= ~uint64_t{0} << (begin - at);
        if (at + kChunk > end) chosen &= (uint64_t{1} << (end - at)) - 1;
        if (chosen != 0) best.add(scores, chosen, tile.newest - at);
    }
}

// The bytes of one key or query as words; dims beyond `dim` are zeros before the offset is added.
DSA_INLINE void pack_bytes(const int8_t* row, int64_t stride, int64_t dim, int offset, int32_t* out, int64_t step) {
    for (int64_t first = 0; first < dim; first += kDimsInLane, out += step) {
        uint32_t word = 0;
        for (int i = 0; i < kDimsInLane; ++i) {
            const int value = (first + i < dim ? row[(first + i) * stride] : 0) + offset;
            word |= (static_cast<uint32_t>(value) & (0xffffffffu >> (32 - 32 / kDimsInLane))) << (i * (32 / kDimsInLane));
        }
        *out = static_cast<int32_t>(word);
    }
}

// One key into lane `lane` of a tile whose other keys lie kWidth words apart.
DSA_INLINE void pack_key(const int8_t* row, int64_t stride, int64_t dim, int32_t* lane) {
    pack_bytes(row, stride, dim, kKeyOffset, lane, kWidth);
}

template <class T>
DSA_INLINE void pack_key(const T* row, int64_t stride, int64_t dim, int32_t* lane) {
    for (int64_t i = 0; i < dim; ++i) lane[i * kWidth] = static_cast<int32_t>(to_bits(widen(row[i * stride])));
}

}  // namespace
}  // namespace dsa::DSA_ISA
