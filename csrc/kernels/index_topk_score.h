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

// Heads whose sums fit the registers beside the keys.
constexpr int kHeadsAtATime = 4;

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

// Scores kChunk keys.
template <class Keys>
DSA_INLINE void score_chunk(const int32_t* DSA_RESTRICT keys, const float* DSA_RESTRICT scale, int64_t words,
                            int64_t heads, const Query& query, float* DSA_RESTRICT out) {
    F32 scores[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) scores[v] = zero();
    int64_t head = 0;
    for (; head + kHeadsAtATime <= heads; head += kHeadsAtATime)
        add_heads<Keys, kHeadsAtATime>(keys, words, query, head, scores);
    for (; head < heads; ++head) add_heads<Keys, 1>(keys, words, query, head, scores);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
        store(out + v * kWidth, Keys::kScaled ? scores[v] * load(scale + v * kWidth) : scores[v]);
}

// Scores the keys [begin, end) of a tile and hands those that beat the threshold to `best`.
template <class Keys>
void scan_tile(const Tile& tile, int64_t begin, int64_t end, int64_t words, int64_t heads, const Query& query,
               Candidates& best) {
    alignas(64) float scores[kSpan];
    for (int64_t first = begin / kChunk * kChunk; first < end; first += kSpan) {
        const int64_t last = smaller(first + kSpan, end);
        for (int64_t at = first; at < last; at += kChunk)
            score_chunk<Keys>(tile.words + at * words, tile.scale + at, words, heads, query, scores + at - first);
        best.add(scores, larger<int64_t>(0, begin - first), last - first, tile.newest - first);
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

#if defined(__AVX2__)
// Keys are asked for this many before they are packed: a decoding step is the first to read them since the last one.
constexpr int64_t kKeysAhead = 256;

// Eight keys of eight words each at a time, turned in registers: a decoding step packs as many keys as it scores, so
// packing one by one would cost it several times the scores.
//
// Args: `row`: the newest key, the next one `stride` bytes before it; `lanes`: where its first word goes.
DSA_INLINE void pack_eight_keys(const int8_t* row, int64_t stride, int64_t words, int32_t* lanes) {
    const __m256i offset = _mm256_set1_epi8(static_cast<char>(kKeyOffset));
    for (int64_t word = 0; word < words; word += 8) {
        __m256i r[8], pair[8], four[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const int8_t* from = row - i * stride + word * 4;
            r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
            _mm_prefetch(reinterpret_cast<const char*>(from - kKeysAhead * stride), _MM_HINT_T0);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
            pair[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
            pair[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 8; i += 4) {
            four[i] = _mm256_unpacklo_epi64(pair[i], pair[i + 2]);
            four[i + 1] = _mm256_unpackhi_epi64(pair[i], pair[i + 2]);
            four[i + 2] = _mm256_unpacklo_epi64(pair[i + 1], pair[i + 3]);
            four[i + 3] = _mm256_unpackhi_epi64(pair[i + 1], pair[i + 3]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m256i low = _mm256_permute2x128_si256(four[i], four[i + 4], 0x20);
            const __m256i high = _mm256_permute2x128_si256(four[i], four[i + 4], 0x31);
            int32_t* out = lanes + (word + i) * kWidth;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_xor_si256(low, offset));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4 * kWidth), _mm256_xor_si256(high, offset));
        }
    }
}
#endif

}  // namespace
}  // namespace dsa::DSA_ISA
