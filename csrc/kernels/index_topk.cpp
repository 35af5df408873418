// The lightning indexer and its selection: a block of queries goes through the keys from the newest to the oldest,
// tile by tile, and of each query only the keys that beat its K best so far are kept. Interface: dsa/index_topk.h.
//
// Shapes: B batch, T query tokens, S key tokens, Hi/Di index heads / index head dim, K top-k.
#include "dsa/index_topk.h"

#include "kernels/e4m3.h"
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
// Keys that a threshold is guessed from, and how many queries make looking at them worth it.
constexpr int64_t kSampledKeys = 1024;
constexpr int64_t kQueriesForSample = 8;
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
          top_k(args.selection.size[2]),
          wanted(top_k - args.sinks - args.local),
          quantised(args.key.dtype == DSA_I8),
          words(quantised ? Bytes::words(dim) : Floats::words(dim)),
          block(smaller<int64_t>(tokens, larger<int64_t>(1, kQueriesAtATime * 2048 / larger<int64_t>(2048, wanted)))),
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

    int32_t* selection(int64_t b, int64_t t) const {
        return static_cast<int32_t*>(args.selection.data) + (b * tokens + t) * top_k;
    }

    template <class T>
    static T at(const dsa_tensor& tensor, int64_t i, int64_t j) {
        return static_cast<const T*>(tensor.data)[i * tensor.stride[0] + j * tensor.stride[1]];
    }

    const dsa_index_topk_args& args;
    const int64_t batch, tokens, heads, dim, keys, top_k;
    const int64_t wanted;  // how many a query chooses beside sinks and local tokens
    const bool quantised;
    const int64_t words, block, tile, blocks;
    int64_t segments;  // into which the keys of a block are split among threads
};

// Scratch memory of one thread, laid out once.
class Workspace {
  public:
    explicit Workspace(const Problem& p)
        : capacity(Candidates::capacity(p.wanted) + kWidth),
          tile_(take(p.tile * p.words * 4)),
          tile_scale_(take(p.tile * 4)),
          query_(take(p.block * p.heads * p.words * 4)),
          factor_(take(p.block * p.heads * 4)),
          start_(take(p.block * p.heads * 4)),
          row_(take(p.dim * 4)),
          bytes_(take(p.dim)),
          ranges_(take(p.block * static_cast<int64_t>(sizeof(Range)))),
          best_(take(p.block * static_cast<int64_t>(sizeof(Candidates)))),
          pairs_(take(p.block * capacity * 8)) {}

    int64_t bytes() const { return used_; }
    void use(char* memory) { memory_ = memory; }

    int32_t* tile() const { return at<int32_t>(tile_); }
    float* tile_scale() const { return at<float>(tile_scale_); }
    int32_t* query() const { return at<int32_t>(query_); }
    float* factor() const { return at<float>(factor_); }
    int32_t* start() const { return at<int32_t>(start_); }
    float* row() const { return at<float>(row_); }
    int8_t* row_bytes() const { return at<int8_t>(bytes_); }
    Range* ranges() const { return at<Range>(ranges_); }
    Candidates* best() const { return at<Candidates>(best_); }
    Query query_at(const Problem& p, int64_t slot) const {
        return {query() + slot * p.heads * p.words, factor() + slot * p.heads, start() + slot * p.heads};
    }
    int32_t* order(int64_t query) const { return at<int32_t>(pairs_) + query * 2 * capacity; }
    int32_t* position(int64_t query) const { return order(query) + capacity; }

    const int64_t capacity;

  private:
    int64_t take(int64_t bytes) {
        const int64_t offset = used_;
        used_ += round_up(bytes, 64);
        return offset;
    }
    template <class T>
    T* at(int64_t offset) const {
        return reinterpret_cast<T*>(memory_ + offset);
    }

    int64_t used_ = 0;
    const int64_t tile_, tile_scale_, query_, factor_, start_, row_, bytes_, ranges_, best_, pairs_;
    char* memory_ = nullptr;
};

// What the segments of a block's keys have found, for the merge: [B * T, segments] lists of `wanted` pairs.
struct Lists {
    int32_t* order;
    int32_t* position;
    int64_t* count;
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

float weight_of(const Problem& p, int64_t b, int64_t t, int64_t head) {
    const dsa_tensor& w = p.args.weight;
    const int64_t offset = b * w.stride[0] + t * w.stride[1] + head * w.stride[2];
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

// Brings one query into the form in which it is scored; `slot` is its place in the block.
void prepare_query(const Problem& p, const Workspace& space, int64_t b, int64_t t, int64_t slot) {
    for (int64_t head = 0; head < p.heads; ++head) {
        const int64_t place = slot * p.heads + head;
        int32_t* words = space.query() + place * p.words;
        const float weight = weight_of(p, b, t, head);
        widen_query(p, b, t, head, space.row());
        if (!p.quantised) {
            memcpy(words, space.row(), static_cast<size_t>(p.dim) * 4);
            space.factor()[place] = weight * p.args.scale;
            space.start()[place] = 0;
            continue;
        }
        int8_t* bytes = space.row_bytes();
        const float scale = quantize_row(space.row(), p.dim, kQueryLevels, bytes);
        space.factor()[place] = (weight * scale) * p.args.scale;
        int32_t sum = 0;
        for (int64_t i = 0; i < p.dim; ++i) sum += bytes[i];
        space.start()[place] = -kKeyOffset * sum;
        pack_bytes(bytes, 1, p.dim, 0, words, 1);
    }
}

template <class T>
void pack_tile_of(const Problem& p, const Workspace& space, int64_t b, int64_t newest, int64_t count, int64_t step) {
    const dsa_tensor& k = p.args.key;
    const int64_t stride = k.stride[1] * step;
    const T* key = static_cast<const T*>(k.data) + b * k.stride[0] + newest * k.stride[1];
    int64_t i = 0;
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 1) {
        // Adding 128 to a byte turns its highest bit.
        static_assert(kKeyOffset == 128, "pack_eight_keys turns the highest bit");
        if (k.stride[2] == 1 && p.dim % 32 == 0)
            for (; i + 8 <= count; i += 8)
                pack_eight_keys(key - i * stride, stride, p.words,
                                space.tile() + i / kWidth * kWidth * p.words + i % kWidth);
    }
#endif
    for (key -= i * stride; i < count; ++i, key -= stride)
        pack_key(key, k.stride[2], p.dim, space.tile() + i / kWidth * kWidth * p.words + i % kWidth);
    if (!p.quantised) return;
    const dsa_tensor& s = p.args.key_scale;
    const float* scale = static_cast<const float*>(s.data) + b * s.stride[0] + newest * s.stride[1];
    for (i = 0; i < count; ++i, scale -= s.stride[1] * step) space.tile_scale()[i] = *scale;
}

// Keys in e4m3 are scored as floats, and what they are times their scale is what is packed.
void pack_e4m3_tile(const Problem& p, const Workspace& space, int64_t b, int64_t newest, int64_t count, int64_t step) {
    const dsa_tensor &k = p.args.key, &s = p.args.key_scale;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t at = newest - i * step;
        const float scale = Problem::at<float>(s, b, at);
        decode_e4m3(static_cast<const uint8_t*>(k.data) + b * k.stride[0] + at * k.stride[1], k.stride[2], p.dim, scale,
                    space.row());
        pack_key(space.row(), 1, p.dim, space.tile() + i / kWidth * kWidth * p.words + i % kWidth);
    }
}

// Packs `count` keys from `newest` down, every `step`-th. Lanes behind them keep what they held; no query's range
// includes them.
void pack_tile(const Problem& p, const Workspace& space, int64_t b, int64_t newest, int64_t count, int64_t step = 1) {
    switch (p.args.key.dtype) {
        case DSA_I8: return pack_tile_of<int8_t>(p, space, b, newest, count, step);
        case DSA_E4M3: return pack_e4m3_tile(p, space, b, newest, count, step);
        case DSA_F32: return pack_tile_of<float>(p, space, b, newest, count, step);
        case DSA_BF16: return pack_tile_of<Bf16>(p, space, b, newest, count, step);
        case DSA_F16: return pack_tile_of<F16>(p, space, b, newest, count, step);
    }
}

// All that is visible, or sinks and local tokens around what was chosen, given from the newest to the oldest.
void write_selection(const Problem& p, const Range& range, int32_t* out, const Candidates* best) {
    int64_t written = 0;
    if (best == nullptr) {
        for (int64_t s = range.first; s < range.last; ++s) out[written++] = static_cast<int32_t>(s);
        for (; written < p.top_k; ++written) out[written] = -1;
        return;
    }
    for (int64_t s = range.first; s < range.begin; ++s) out[written++] = static_cast<int32_t>(s);
    for (int64_t i = best->count(); i-- > 0;) out[written++] = best->position()[i];
    for (int64_t s = range.end; s < range.last; ++s) out[written++] = static_cast<int32_t>(s);
}

// The keys of one segment of a block: [low, high).
struct Segment {
    int64_t batch, rows, low, high;
};

// Scores the keys of a segment for the queries [first, last) of its block.
template <class Keys>
void scan_segment(const Problem& p, const Workspace& space, const Segment& s, int64_t first, int64_t last) {
    for (int64_t top = s.high; top > s.low; top -= p.tile) {
        const int64_t bottom = larger(s.low, top - p.tile);
        bool packed = false;
        for (int64_t r = first; r < last; ++r) {
            const Range& range = space.ranges()[r];
            const int64_t begin = larger<int64_t>(0, top - range.end), end = top - larger(bottom, range.begin);
            if (begin >= end || range.begin >= range.end) continue;
            if (!packed) pack_tile(p, space, s.batch, top - 1, top - bottom);
            packed = true;
            const Tile tile{space.tile(), space.tile_scale(), top - 1};
            scan_tile<Keys>(tile, begin, end, p.words, p.heads, space.query_at(p, r), space.best()[r]);
        }
    }
}

// Guesses each query's threshold from the scores of a sample of the keys: low enough that hardly ever fewer than
// `wanted` keys exceed it, and high enough that most that will not be selected never become candidates.
template <class Keys>
void guess_thresholds(const Problem& p, const Workspace& space, const Segment& s) {
    const int64_t rounds = ceil_div(kSampledKeys, p.tile), sampled = rounds * p.tile;
    const int64_t step = (s.high - s.low) / sampled;
    if (s.rows < kQueriesForSample || step < 8) return;
    // How many of the sample a query sees; key i of all lies at high - 1 - i * step.
    const auto seen = [&](const Range& range, int64_t& begin, int64_t& end) {
        begin = range.end >= s.high ? 0 : ceil_div(s.high - range.end, step);
        end = smaller(sampled, (s.high - 1 - larger(range.begin, s.low)) / step + 1);
        return larger<int64_t>(0, end - begin);
    };
    const auto rank = [&](const Range& range, int64_t some) {
        const int64_t all = smaller(range.end, s.high) - larger(range.begin, s.low);
        const double expected = static_cast<double>(p.wanted) * static_cast<double>(some) / static_cast<double>(all);
        return static_cast<int64_t>(expected + 3 * sqrt(expected)) + 3;
    };
    int64_t begin, end;
    for (int64_t r = 0; r < s.rows; ++r) {
        const Range& range = space.ranges()[r];
        if (range.begin >= range.end) continue;
        const int64_t some = seen(range, begin, end);
        // A rank deep within the sample would exclude too little, and must fit the room for candidates.
        const int64_t wanted = some > 0 ? rank(range, some) : p.wanted;
        space.best()[r].begin(4 * wanted <= some && wanted <= p.wanted ? wanted : 0, space.order(r), space.position(r));
    }
    for (int64_t round = 0; round < rounds; ++round) {
        const int64_t first = round * p.tile, newest = s.high - 1 - first * step;
        pack_tile(p, space, s.batch, newest, p.tile, step);
        const Tile tile{space.tile(), space.tile_scale(), newest};
        for (int64_t r = 0; r < s.rows; ++r) {
            const Range& range = space.ranges()[r];
            if (range.begin >= range.end || space.best()[r].wanted() == 0 || seen(range, begin, end) == 0) continue;
            begin = larger<int64_t>(0, begin - first);
            end = smaller(p.tile, end - first);
            if (begin < end) scan_tile<Keys>(tile, begin, end, p.words, p.heads, space.query_at(p, r), space.best()[r]);
        }
    }
    for (int64_t r = 0; r < s.rows; ++r) {
        const Range& range = space.ranges()[r];
        if (range.begin >= range.end) continue;
        Candidates& best = space.best()[r];
        const float guess = best.wanted() == 0 ? __builtin_nanf("") : best.bound_of_kept();
        best.begin(p.wanted, space.order(r), space.position(r), guess);
    }
}

// One block of queries over one segment of the keys that they see.
template <class Keys>
void scan_block(const Problem& p, const Workspace& space, int64_t item, const Lists& lists) {
    const int64_t segment = item % p.segments, b = item / p.segments % p.batch;
    // The last queries see most: they go first, so that no thread is left with much at the end.
    const int64_t row = (p.blocks - 1 - item / p.segments / p.batch) * p.block;
    const int64_t rows = smaller(p.block, p.tokens - row);
    int64_t low = p.keys, high = 0;
    for (int64_t r = 0; r < rows; ++r) {
        Range& range = space.ranges()[r] = p.range(b, row + r);
        if (range.begin >= range.end) {
            if (segment == 0) write_selection(p, range, p.selection(b, row + r), nullptr);
            continue;
        }
        prepare_query(p, space, b, row + r, r);
        space.best()[r].begin(p.wanted, space.order(r), space.position(r));
        low = smaller(low, range.begin);
        high = larger(high, range.end);
    }
    if (p.segments > 1 && low < high) {
        const int64_t whole = high - low;
        high = low + whole * (p.segments - segment) / p.segments;
        low = low + whole * (p.segments - segment - 1) / p.segments;
    }
    if (p.wanted > 0 && low < high) {
        const Segment keys{b, rows, low, high};
        guess_thresholds<Keys>(p, space, keys);
        scan_segment<Keys>(p, space, keys, 0, rows);
        for (int64_t r = 0; r < rows; ++r) {
            const Range& range = space.ranges()[r];
            if (range.begin >= range.end || !space.best()[r].guessed_too_high()) continue;
            space.best()[r].begin(p.wanted, space.order(r), space.position(r));
            scan_segment<Keys>(p, space, keys, r, r + 1);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const Range& range = space.ranges()[r];
        if (range.begin >= range.end) continue;
        Candidates& best = space.best()[r];
        best.shrink();
        if (p.segments == 1) {
            write_selection(p, range, p.selection(b, row + r), &best);
            continue;
        }
        const int64_t list = (b * p.tokens + row + r) * p.segments + segment;
        const size_t bytes = static_cast<size_t>(best.count()) * 4;
        memcpy(lists.order + list * p.wanted, best.order(), bytes);
        memcpy(lists.position + list * p.wanted, best.position(), bytes);
        lists.count[list] = best.count();
    }
}

// The best of what the segments have found; the first segment is the newest.
void merge(const Problem& p, const Workspace& space, int64_t query, const Lists& lists) {
    const int64_t b = query / p.tokens, t = query % p.tokens;
    const Range range = p.range(b, t);
    if (range.begin >= range.end) return;
    Candidates best;
    best.begin(p.wanted, space.order(0), space.position(0));
    for (int64_t list = query * p.segments; list < (query + 1) * p.segments; ++list)
        best.add(lists.order + list * p.wanted, lists.position + list * p.wanted, lists.count[list]);
    best.shrink();
    write_selection(p, range, p.selection(b, t), &best);
}

}  // namespace

int index_topk(const dsa_index_topk_args& args) {
    const Problem p(args);
    if (!fit(p, args.key_start) || !fit(p, args.key_end)) return DSA_OUT_OF_RANGE;
    const int64_t items = p.batch * p.blocks * p.segments;
    if (items == 0) return DSA_OK;
    const int threads = static_cast<int>(larger<int64_t>(1, smaller<int64_t>(args.threads, items)));
    Workspace space(p);
    const int64_t list_count = p.segments > 1 ? p.batch * p.tokens * p.segments : 0;
    const int64_t list_bytes = round_up(list_count * p.wanted * 4, 64);
    Scratch scratch(threads * space.bytes() + 2 * list_bytes + list_count * 8);
    if (scratch.failed()) return DSA_OUT_OF_MEMORY;
    char* shared = scratch.at<char>(threads * space.bytes());
    const Lists lists{reinterpret_cast<int32_t*>(shared), reinterpret_cast<int32_t*>(shared + list_bytes),
                      reinterpret_cast<int64_t*>(shared + 2 * list_bytes)};
    for_each_item(items, threads, [&](int64_t item, int worker) {
        Workspace mine = space;
        mine.use(scratch.at<char>(worker * space.bytes()));
        if (p.quantised)
            scan_block<Bytes>(p, mine, item, lists);
        else
            scan_block<Floats>(p, mine, item, lists);
    });
    if (p.segments == 1) return DSA_OK;
    for_each_item(p.batch * p.tokens, threads, [&](int64_t query, int worker) {
        Workspace mine = space;
        mine.use(scratch.at<char>(worker * space.bytes()));
        merge(p, mine, query, lists);
    });
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
