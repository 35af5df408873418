// Scores of a tile of keys for one query. The keys lie interleaved, one key a lane, so that no sum runs across lanes
// and the order of every sum is the same wherever a key lies: a tile is packed once and serves a block of queries.
//
// Shapes: Hi/Di index heads / index head dim; a `word` is 32 bits of one key or query, kDimsInLane bytes or one float.
#pragma once

#include "kernels/index_topk_bounds.h"
#include "kernels/index_topk_candidates.h"

namespace dsa::DSA_ISA {
namespace {

// Keys of one tile, the newest first.
struct Tile {
    const int32_t* words;     // [keys / kWidth, words of a key, kWidth]
    const float* scale;       // [keys], where keys are quantised
    const int32_t* outlines;  // [keys / kWidth, kOutline, kWidth], or absent
    int64_t newest;           // position of the first
};

// One query: the words of its heads as `Keys::add` takes them, the factor of each head in each selection, and what each head's
// sum starts from.
struct Query {
    const int32_t* words;
    const float* factor;  // of the first selection; the next one's are `stride` further on
    const int32_t* start;
    int64_t stride;
};

// What is the same for all queries, and room for the scores of a span: [selections, kSpan].
struct Scoring {
    int64_t words;  // of a key
    int64_t heads, selections;
    float* scores;
};

// Index keys in eight bits: integers, with one scale a key.
struct Bytes {
    static constexpr bool kScaled = true;
    static constexpr int kWords = kWordsAtATime;
    using Sum = I32;
    static int64_t words(int64_t dim) { return round_up(ceil_div(dim, kDimsInLane), kWords); }
    DSA_INLINE static Sum start(int32_t value) { return broadcast(value); }
    DSA_INLINE static Sum load_key(const int32_t* words) { return load(words); }
#if defined(DSA_WORDS_IN_PAIRS)
    // Of a query: two words, and the correction of their products.
    static constexpr int kQueryWords = 3;
    DSA_INLINE static Sum add(Sum sum, const Sum (&key)[2], const int32_t* query) {
        return dot(sum, key, {broadcast(query[0]), broadcast(query[1])}, broadcast(query[2]));
    }
#else
    static constexpr int kQueryWords = 1;
    DSA_INLINE static Sum add(Sum sum, const Sum (&key)[1], const int32_t* query) {
        return dot(sum, key[0], broadcast(query[0]));
    }
#endif
    DSA_INLINE static F32 relu(Sum sum) { return to_float(max(sum, broadcast(0))); }
};

// Floating keys, widened to fp32.
struct Floats {
    static constexpr bool kScaled = false;
    static constexpr int kWords = 1, kQueryWords = 1;
    using Sum = F32;
    static int64_t words(int64_t dim) { return dim; }
    DSA_INLINE static Sum start(int32_t) { return zero(); }
    DSA_INLINE static Sum load_key(const int32_t* words) { return load(reinterpret_cast<const float*>(words)); }
    DSA_INLINE static Sum add(Sum sum, const Sum (&key)[1], const int32_t* query) {
        return fma(key[0], broadcast(from_bits(static_cast<uint32_t>(query[0]))), sum);
    }
    // The second operand where one is NaN: an unknown product stays unknown.
    DSA_INLINE static F32 relu(Sum sum) { return max(zero(), sum); }
};

// Heads whose sums fit the registers along with the keys.
#if defined(DSA_WORDS_IN_PAIRS)
constexpr int kHeadsAtATime = 2;
#else
constexpr int kHeadsAtATime = 4;
#endif
// Chunks whose bounds are made at a time, of two heads.
#if defined(__AVX2__)
constexpr int kBoundChunks = 2;
#else
constexpr int kBoundChunks = 1;
#endif

// The products of `kHeads` heads with `kVectors` vectors of keys.
template <class Keys, int kHeads, int kVectors>
DSA_INLINE void multiply_heads(const int32_t* DSA_RESTRICT keys, int64_t words, const Query& query, int64_t head,
                               typename Keys::Sum (&sum)[kHeads][kVectors]) {
    const int64_t query_words = words / Keys::kWords * Keys::kQueryWords;
    const int32_t* DSA_RESTRICT from = query.words + head * query_words;
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
        const typename Keys::Sum start = Keys::start(query.start[head + h]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[h][v] = start;
    }
    for (int64_t word = 0; word < words; word += Keys::kWords, from += Keys::kQueryWords) {
        typename Keys::Sum key[kVectors][Keys::kWords];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 2
            for (int w = 0; w < Keys::kWords; ++w) key[v][w] = Keys::load_key(keys + (v * words + word + w) * kWidth);
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[h][v] = Keys::add(sum[h][v], key[v], from + h * query_words);
    }
}

// Adds `kHeads` heads to the scores of `kVectors` vectors of keys.
template <class Keys, int kHeads, int kVectors>
DSA_INLINE void add_heads(const int32_t* DSA_RESTRICT keys, int64_t words, const Query& query, int64_t head,
                          F32* DSA_RESTRICT scores) {
    typename Keys::Sum sum[kHeads][kVectors];
    multiply_heads<Keys, kHeads, kVectors>(keys, words, query, head, sum);
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
        const F32 factor = broadcast(query.factor[head + h]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) scores[v] = scores[v] + Keys::relu(sum[h][v]) * factor;
    }
}

// Writes the begins of those chunks of the keys [first, last) to `chunks` whose bound is not below `threshold` for one key
// at least, and returns how many. A bound that is not a number is below nothing. Not inlined: the registers of the loop over
// scores are for that alone.
__attribute__((noinline)) int64_t exceeding_chunks(const int32_t* DSA_RESTRICT outlines, const Query& query, int64_t heads,
                                                   F32 threshold, int64_t first, int64_t last,
                                                   int32_t* DSA_RESTRICT chunks) {
    int64_t count = 0;
    for (int64_t at = first; at < last; at += kBoundChunks * kChunk) {
        F32 bounds[kBoundChunks * kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kBoundChunks * kVectors; ++v) bounds[v] = zero();
        const int32_t* DSA_RESTRICT keys = outlines + at * kOutline;
        int64_t head = 0;
        for (; head + 2 <= heads; head += 2) {
            add_heads<Floats, 2, kBoundChunks * kVectors>(keys, kOutline, query, head, bounds);
            __asm__("" : "+r"(keys));  // GCC would load all of them before the loop, and store them elsewhere.
        }
        if (head < heads) add_heads<Floats, 1, kBoundChunks * kVectors>(keys, kOutline, query, head, bounds);
#pragma GCC unroll 8
        for (int c = 0; c < kBoundChunks; ++c) {
            uint32_t below = kAllLanes;
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) below &= above(threshold, bounds[c * kVectors + v]);
            chunks[count] = static_cast<int32_t>(at + c * kChunk);
            count += below != kAllLanes && at + c * kChunk < last;
        }
    }
    return count;
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
        add_heads<Keys, kHeadsAtATime, kVectors>(keys, words, query, head, scores);
    for (; head < heads; ++head) add_heads<Keys, 1, kVectors>(keys, words, query, head, scores);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
        store(out + v * kWidth, Keys::kScaled ? scores[v] * load(scale + v * kWidth) : scores[v]);
}

// The same heads in the scores of every selection, [selections, kSpan] in `out`: multiplied once, weighed for each. They wait in
// the first cache between the heads.
template <class Keys, int kHeads>
DSA_INLINE void add_heads_to_each(const int32_t* DSA_RESTRICT keys, const float* DSA_RESTRICT scale, const Scoring& scoring,
                                  const Query& query, int64_t head, float* DSA_RESTRICT out) {
    typename Keys::Sum sum[kHeads][kVectors];
    multiply_heads<Keys, kHeads, kVectors>(keys, scoring.words, query, head, sum);
    F32 dot[kHeads][kVectors];
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) dot[h][v] = Keys::relu(sum[h][v]);
    const bool first = head == 0, last = head + kHeads == scoring.heads;
    const float* DSA_RESTRICT factor = query.factor + head;
    for (int64_t s = 0; s < scoring.selections; ++s, factor += query.stride, out += kSpan) {
        F32 scores[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) scores[v] = first ? zero() : load(out + v * kWidth);
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
            const F32 of_head = broadcast(factor[h]);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) scores[v] = scores[v] + dot[h][v] * of_head;
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
            store(out + v * kWidth, Keys::kScaled && last ? scores[v] * load(scale + v * kWidth) : scores[v]);
    }
}

// Scores kChunk keys for every selection.
template <class Keys>
DSA_INLINE void score_chunk_for_each(const int32_t* DSA_RESTRICT keys, const float* DSA_RESTRICT scale, const Scoring& scoring,
                                     const Query& query, float* DSA_RESTRICT out) {
    int64_t head = 0;
    for (; head + kHeadsAtATime <= scoring.heads; head += kHeadsAtATime)
        add_heads_to_each<Keys, kHeadsAtATime>(keys, scale, scoring, query, head, out);
    for (; head < scoring.heads; ++head) add_heads_to_each<Keys, 1>(keys, scale, scoring, query, head, out);
}

// `exceeding_chunks` for several selections: chunks that can matter to one of them at least.
__attribute__((noinline)) int64_t chunks_exceeding_any(const int32_t* DSA_RESTRICT outlines, const Query& query,
                                                       const Scoring& bounding, const Candidates* best, int64_t first,
                                                       int64_t last, int32_t* DSA_RESTRICT chunks) {
    int64_t count = 0;
    for (int64_t at = first; at < last; at += kChunk) {
        score_chunk_for_each<Floats>(outlines + at * kOutline, nullptr, bounding, query, bounding.scores);
        uint32_t below = kAllLanes;
        for (int64_t s = 0; s < bounding.selections; ++s) {
            const F32 threshold = broadcast(best[s].threshold());
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) below &= above(threshold, load(bounding.scores + s * kSpan + v * kWidth));
        }
        chunks[count] = static_cast<int32_t>(at);
        count += below != kAllLanes;
    }
    return count;
}

// What a score must exceed to join a selection, for the selection that is joined most easily; NaN while one takes everything.
DSA_INLINE float lowest_threshold(const Candidates* best, int64_t selections) {
    float lowest = best->threshold();
    for (int64_t s = 1; s < selections; ++s) {
        const float threshold = best[s].threshold();
        if (!(threshold >= lowest)) lowest = threshold;
        if (lowest != lowest) break;
    }
    return lowest;
}

// A query's outlines: of those heads that can raise a score.
struct Bounds {
    Query query;
    int64_t heads;
    int32_t waiting;  // tiles before the next look at bounds,
    int32_t pause;    // and how many those were after the last one, which was in vain

    // Whether to look at the bounds of the next tile. Asked once for each. Without heads there is nothing in a bound that
    // says which outlines are unknown.
    DSA_INLINE bool looks(float threshold) {
        if (heads == 0 || !(threshold > kLowestBounded)) return false;
        if (waiting == 0) return true;
        --waiting;
        return false;
    }
};

// Bounds of so many chunks of a tile are looked at first. Only if no more of them exceed the threshold than this are the
// others worth looking at.
constexpr int64_t kProbedChunks = 8, kExceedingOfProbed = 6;
// After looking in vain, twice as many tiles as before pass without, up to this.
constexpr int32_t kLongestPause = 7;

// Scores the keys [begin, end) of a tile and hands those that beat the threshold to `best`, one for each selection; if there
// are `bounds`, not those of chunks where no key can. `kOne`: there is one selection, whose scores stay in registers.
template <class Keys, bool kOne>
void scan_tile(const Tile& tile, int64_t begin, int64_t end, const Scoring& scoring, const Query& query, Bounds* bounds,
               Candidates* best) {
    const int64_t words = scoring.words, selections = kOne ? 1 : scoring.selections;
    float* scores = scoring.scores;
    int32_t chunks[kSpan / kChunk + 1];
    bool bounded = bounds != nullptr, probed = false;
    for (int64_t first = begin / kChunk * kChunk; first < end;) {
        const int64_t last = smaller(first + (bounded && !probed ? kProbedChunks * kChunk : kSpan), end);
        int64_t count = 0;
        if (bounded) {
            const Query& outline = bounds->query;
            if constexpr (kOne) {
                const F32 threshold = broadcast(best->threshold());
                count = exceeding_chunks(tile.outlines, outline, bounds->heads, threshold, first, last, chunks);
            } else {
                const Scoring bounding{kOutline, bounds->heads, selections, scores};
                count = chunks_exceeding_any(tile.outlines, outline, bounding, best, first, last, chunks);
            }
            if (!probed) {
                probed = true;
                bounded = count <= kExceedingOfProbed;
                bounds->pause = bounded ? 0 : smaller(2 * bounds->pause + 1, kLongestPause);
                bounds->waiting = bounds->pause;
            }
        } else {
            for (int64_t at = first; at < last; at += kChunk) chunks[count++] = static_cast<int32_t>(at);
        }
        for (int64_t i = 0; i < count; ++i) {
            const int32_t* keys = tile.words + chunks[i] * words;
            const float* scale = tile.scale + chunks[i];
            if constexpr (kOne)
                score_chunk<Keys>(keys, scale, words, scoring.heads, query, scores + i * kChunk);
            else
                score_chunk_for_each<Keys>(keys, scale, scoring, query, scores + i * kChunk);
        }
        for (int64_t s = 0; s < selections; ++s)
            best[s].add(scores + s * kSpan, chunks, count, begin, end, tile.newest);
        first = last;
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

// The `dim` bytes of a query's head in the form in which `Bytes` multiplies them. Returns what the head's sums start from.
DSA_INLINE int32_t pack_query(const int8_t* bytes, int64_t dim, int32_t* out) {
#if defined(DSA_WORDS_IN_PAIRS)
    for (int64_t first = 0; first < dim; first += 8, out += 3) {
        int8_t eight[8];
        for (int i = 0; i < 8; ++i) eight[i] = first + i < dim ? bytes[first + i] : int8_t{0};
        pack_bytes(eight, 1, 8, 0, out, 1);
        const auto correction = [&](int i) {
            return static_cast<uint32_t>(-kKeyOffset * (eight[i] + eight[i + 1] + eight[i + 4] + eight[i + 5])) & 0xffff;
        };
        out[2] = static_cast<int32_t>(correction(0) | correction(2) << 16);
    }
    return 0;
#else
    pack_bytes(bytes, 1, dim, 0, out, 1);
    int32_t sum = 0;
    for (int64_t i = 0; i < dim; ++i) sum += bytes[i];
    return -kKeyOffset * sum;
#endif
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
// Args: `row`: the newest key, the next one `stride` bytes before it; `lanes`: where its first word goes; `offset`: whose
// highest bits turn those of the bytes.
DSA_INLINE void pack_eight_keys(const int8_t* row, int64_t stride, int64_t words, __m256i offset, int32_t* lanes) {
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
