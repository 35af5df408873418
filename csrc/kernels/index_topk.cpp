// The lightning indexer and its selection: a block of queries goes through the keys from the newest to the oldest,
// tile by tile, and of each query only the keys that beat its K best so far are kept. Interface: dsa/index_topk.h.
//
// Shapes: B batch, T query tokens, S key tokens, Hi/Di index heads / index head dim, Gs selections of a query, K top-k.
#include "kernels/index_topk_problem.h"

namespace dsa::DSA_ISA {
namespace {

// Keys that a threshold is guessed from, and how many queries make looking at them worth it.
constexpr int64_t kSampledKeys = 1024;
constexpr int64_t kQueriesForSample = 8;
// A basis for outlines is found from this many queries and from as many keys as above.
constexpr int64_t kSampledQueries = 256;
// Keys whose outlines a thread makes at a time.
constexpr int64_t kKeysToOutline = 1024;

// Scratch memory of one thread, laid out once.
class Workspace {
  public:
    explicit Workspace(const Problem& p)
        : capacity(Candidates::capacity(p.wanted) + kWidth),
          tile_(take(p.tile * p.words * 4)),
          tile_scale_(take(p.tile * 4)),
          tile_outlines_(take(p.bounded ? round_up(p.tile, kBoundChunks * kChunk) * kOutline * 4 : 0)),
          query_(take(p.block * p.heads * p.query_words * 4)),
          factor_(take(p.block * p.selections * p.heads * 4)),
          start_(take(p.block * p.heads * 4)),
          row_(take(p.dim * 4)),
          bytes_(take(p.dim)),
          outlines_(take(p.bounded ? p.block * p.heads * kOutline * 4 : 0)),
          bound_factor_(take(p.bounded ? p.block * p.selections * p.heads * 4 : 0)),
          bounds_(take(p.bounded ? p.block * static_cast<int64_t>(sizeof(Bounds)) : 0)),
          sums_(take(p.bounded ? p.dim * static_cast<int64_t>(sizeof(double)) : 0)),
          ranges_(take(p.block * static_cast<int64_t>(sizeof(Range)))),
          best_(take(p.block * p.selections * static_cast<int64_t>(sizeof(Candidates)))),
          scores_(take(p.selections * kSpan * 4)),
          pairs_(take(p.block * p.selections * capacity * 8)),
          selections_(p.selections) {}

    int64_t bytes() const { return used_; }
    void use(char* memory) { memory_ = memory; }

    int32_t* tile() const { return at<int32_t>(tile_); }
    float* tile_scale() const { return at<float>(tile_scale_); }
    int32_t* tile_outlines() const { return at<int32_t>(tile_outlines_); }
    int32_t* query() const { return at<int32_t>(query_); }
    float* factor() const { return at<float>(factor_); }
    int32_t* start() const { return at<int32_t>(start_); }
    float* row() const { return at<float>(row_); }
    int8_t* row_bytes() const { return at<int8_t>(bytes_); }
    float* outlines() const { return at<float>(outlines_); }
    float* bound_factor() const { return at<float>(bound_factor_); }
    Bounds* bounds() const { return at<Bounds>(bounds_); }
    double* sums() const { return at<double>(sums_); }
    Range* ranges() const { return at<Range>(ranges_); }
    // One for each selection of a query.
    Candidates* best(int64_t slot) const { return at<Candidates>(best_) + slot * selections_; }
    Query query_at(const Problem& p, int64_t slot) const {
        const int64_t head = slot * p.heads;
        return {query() + head * p.query_words, factor() + head * selections_, start() + head, p.heads};
    }
    Scoring scoring(const Problem& p) const { return {p.words, p.heads, selections_, at<float>(scores_)}; }
    // Begins the selections of a query; `guess(selection)` is what their scores must exceed.
    template <class Guess>
    void begin(int64_t slot, int64_t wanted, const Guess& guess) const {
        for (int64_t s = 0; s < selections_; ++s) {
            int32_t* order = at<int32_t>(pairs_) + (slot * selections_ + s) * 2 * capacity;
            best(slot)[s].begin(wanted, order, order + capacity, guess(best(slot)[s]));
        }
    }
    void begin(int64_t slot, int64_t wanted) const {
        begin(slot, wanted, [](const Candidates&) { return __builtin_nanf(""); });
    }

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
    const int64_t tile_, tile_scale_, tile_outlines_, query_, factor_, start_, row_, bytes_, outlines_, bound_factor_, bounds_,
        sums_, ranges_, best_, scores_, pairs_, selections_;
    char* memory_ = nullptr;
};

// What the segments of a block's keys have found, for the merge: [B * T * Gs, segments] lists of `wanted` pairs.
struct Lists {
    int32_t* order;
    int32_t* position;
    int64_t* count;
};

// Of all keys, and the basis they are made in; absent where bounds are not used.
struct Outlines {
    const OutlineBasis* basis;
    const float* keys;  // [B, S, kOutline]
};

// Brings one query into the form in which it is scored; `slot` is its place in the block.
void prepare_query(const Problem& p, const Workspace& space, const Outlines& outlines, int64_t b, int64_t t, int64_t slot) {
    Bounds bounds{{}, 0, 0, 0};
    const int64_t first = slot * p.heads;
    float *factors = space.factor() + first * p.selections, *bound_factors = space.bound_factor() + first * p.selections;
    for (int64_t head = 0; head < p.heads; ++head) {
        int32_t* words = space.query() + (first + head) * p.query_words;
        const float scale = read_query(p, b, t, head, space.row(), space.row_bytes());
        space.start()[first + head] = p.quantised ? pack_query(space.row_bytes(), p.dim, words) : 0;
        if (!p.quantised) memcpy(words, space.row(), static_cast<size_t>(p.dim) * 4);
        bool raises = false;
        for (int64_t s = 0; s < p.selections; ++s) {
            const float factor = factors[s * p.heads + head] = factor_of(p, b, t, s, head, scale);
            raises |= !(factor <= 0.0f);
        }
        // Other heads add nothing or less. One whose weight is not a number makes every score so, which no bound says.
        if (!outlines.keys || !raises) continue;
        const int64_t kept = bounds.heads++;
        outlines.basis->of_query(space.row(), space.sums(), space.outlines() + (first + kept) * kOutline);
        for (int64_t s = 0; s < p.selections; ++s) {
            const float factor = factors[s * p.heads + head];
            bound_factors[s * p.heads + kept] =
                factor <= 0.0f ? 0.0f : factor * (1.0f + 1.2e-7f * static_cast<float>(p.heads + 8));
        }
    }
    if (!outlines.keys) return;
    bounds.query = {reinterpret_cast<const int32_t*>(space.outlines()) + first * kOutline, bound_factors, space.start() + first,
                    p.heads};
    space.bounds()[slot] = bounds;
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
                pack_eight_keys(key - i * stride, stride, p.words, _mm256_set1_epi8(static_cast<char>(kKeyOffset)),
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

// Packs `count` keys from `newest` down, every `step`-th. Lanes after them keep what they held; no query's range
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

// Packs the outlines of `count` keys from `newest` down, [S, kOutline] for each batch row.
void pack_outlines(const Problem& p, const Workspace& space, const Outlines& outlines, int64_t b, int64_t newest,
                   int64_t count) {
    const float* outline = outlines.keys + (b * p.keys + newest) * kOutline;
    int32_t* lanes = space.tile_outlines();
    int64_t i = 0;
#if defined(__AVX2__)
    constexpr int64_t kBytes = kOutline * 4;
    for (; i + 8 <= count; i += 8)
        pack_eight_keys(reinterpret_cast<const int8_t*>(outline - i * kOutline), kBytes, kOutline, _mm256_setzero_si256(),
                        lanes + i / kWidth * kWidth * kOutline + i % kWidth);
#endif
    for (; i < count; ++i)
        pack_key(outline - i * kOutline, 1, kOutline, lanes + i / kWidth * kWidth * kOutline + i % kWidth);
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
    Outlines outlines;
};

// Scores the keys of a segment for the queries [first, last) of its block.
template <class Keys, bool kOne>
void scan_segment(const Problem& p, const Workspace& space, const Segment& s, int64_t first, int64_t last) {
    for (int64_t top = s.high; top > s.low; top -= p.tile) {
        const int64_t bottom = larger(s.low, top - p.tile);
        bool packed = false, outlines_packed = false;
        for (int64_t r = first; r < last; ++r) {
            const Range& range = space.ranges()[r];
            const int64_t begin = larger<int64_t>(0, top - range.end), end = top - larger(bottom, range.begin);
            if (begin >= end || range.begin >= range.end) continue;
            Candidates* best = space.best(r);
            const float threshold = kOne ? best->threshold() : lowest_threshold(best, p.selections);
            Bounds* bounds = s.outlines.keys && space.bounds()[r].looks(threshold) ? space.bounds() + r : nullptr;
            if (!packed) pack_tile(p, space, s.batch, top - 1, top - bottom);
            if (bounds && !outlines_packed) pack_outlines(p, space, s.outlines, s.batch, top - 1, top - bottom);
            packed = true;
            outlines_packed |= bounds != nullptr;
            const Tile tile{space.tile(), space.tile_scale(), space.tile_outlines(), top - 1};
            scan_tile<Keys, kOne>(tile, begin, end, space.scoring(p), space.query_at(p, r), bounds, best);
        }
    }
}

// Guesses each query's threshold from the scores of a sample of the keys: low enough that hardly ever fewer than
// `wanted` keys exceed it, and high enough that most that will not be selected never become candidates.
template <class Keys, bool kOne>
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
        space.begin(r, 4 * wanted <= some && wanted <= p.wanted ? wanted : 0);
    }
    for (int64_t round = 0; round < rounds; ++round) {
        const int64_t first = round * p.tile, newest = s.high - 1 - first * step;
        pack_tile(p, space, s.batch, newest, p.tile, step);
        const Tile tile{space.tile(), space.tile_scale(), nullptr, newest};
        for (int64_t r = 0; r < s.rows; ++r) {
            const Range& range = space.ranges()[r];
            if (range.begin >= range.end || space.best(r)->wanted() == 0 || seen(range, begin, end) == 0) continue;
            begin = larger<int64_t>(0, begin - first);
            end = smaller(p.tile, end - first);
            if (begin < end)
                scan_tile<Keys, kOne>(tile, begin, end, space.scoring(p), space.query_at(p, r), nullptr, space.best(r));
        }
    }
    for (int64_t r = 0; r < s.rows; ++r) {
        const Range& range = space.ranges()[r];
        if (range.begin >= range.end) continue;
        space.begin(r, p.wanted, [](Candidates& best) { return best.wanted() == 0 ? __builtin_nanf("") : best.bound_of_kept(); });
    }
}

// One block of queries over one segment of the keys that they see.
template <class Keys, bool kOne>
void scan_block(const Problem& p, const Workspace& space, const Outlines& outlines, int64_t item, const Lists& lists) {
    const int64_t segment = item % p.segments, b = item / p.segments % p.batch;
    // The last queries see most: they go first, so that no thread is left with much at the end.
    const int64_t row = (p.blocks - 1 - item / p.segments / p.batch) * p.block;
    const int64_t rows = smaller(p.block, p.tokens - row);
    int64_t low = p.keys, high = 0;
    for (int64_t r = 0; r < rows; ++r) {
        Range& range = space.ranges()[r] = p.range(b, row + r);
        if (range.begin >= range.end) {
            for (int64_t s = 0; segment == 0 && s < p.selections; ++s)
                write_selection(p, range, p.selection(b, row + r, s), nullptr);
            continue;
        }
        prepare_query(p, space, outlines, b, row + r, r);
        space.begin(r, p.wanted);
        low = smaller(low, range.begin);
        high = larger(high, range.end);
    }
    if (p.segments > 1 && low < high) {
        const int64_t whole = high - low;
        high = low + whole * (p.segments - segment) / p.segments;
        low = low + whole * (p.segments - segment - 1) / p.segments;
    }
    if (p.wanted > 0 && low < high) {
        const Segment keys{b, rows, low, high, outlines};
        guess_thresholds<Keys, kOne>(p, space, keys);
        scan_segment<Keys, kOne>(p, space, keys, 0, rows);
        for (int64_t r = 0; r < rows; ++r) {
            const Range& range = space.ranges()[r];
            bool too_high = false;
            for (int64_t s = 0; s < p.selections; ++s) too_high |= space.best(r)[s].guessed_too_high();
            if (range.begin >= range.end || !too_high) continue;
            space.begin(r, p.wanted);
            scan_segment<Keys, kOne>(p, space, keys, r, r + 1);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const Range& range = space.ranges()[r];
        if (range.begin >= range.end) continue;
        for (int64_t s = 0; s < p.selections; ++s) {
            Candidates& best = space.best(r)[s];
            best.shrink();
            if (p.segments == 1) {
                write_selection(p, range, p.selection(b, row + r, s), &best);
                continue;
            }
            const int64_t list = ((b * p.tokens + row + r) * p.selections + s) * p.segments + segment;
            const size_t bytes = static_cast<size_t>(best.count()) * 4;
            memcpy(lists.order + list * p.wanted, best.order(), bytes);
            memcpy(lists.position + list * p.wanted, best.position(), bytes);
            lists.count[list] = best.count();
        }
    }
}

// The best of what the segments have found for one selection; the first segment is the newest.
void merge(const Problem& p, const Workspace& space, int64_t item, const Lists& lists) {
    const int64_t s = item % p.selections, query = item / p.selections, b = query / p.tokens, t = query % p.tokens;
    const Range range = p.range(b, t);
    if (range.begin >= range.end) return;
    space.begin(0, p.wanted);
    Candidates& best = *space.best(0);
    for (int64_t list = item * p.segments; list < (item + 1) * p.segments; ++list)
        best.add(lists.order + list * p.wanted, lists.position + list * p.wanted, lists.count[list]);
    best.shrink();
    write_selection(p, range, p.selection(b, t, s), &best);
}

// A basis from a sample of queries and keys; false where that says nothing.
bool find_basis(const Problem& p, const Workspace& space, OutlineBasis* basis) {
    const int64_t queries = p.batch * p.tokens, keys = p.batch * p.keys;
    const int64_t some_queries = smaller(queries, kSampledQueries), some_keys = smaller(keys, kSampledKeys);
    basis->clear();
    for (int64_t i = 0; i < some_queries; ++i) {
        const int64_t at = i * queries / some_queries;
        const int64_t b = at / p.tokens, t = at % p.tokens;
        for (int64_t head = 0; head < p.heads; ++head) {
            const float scale = read_query(p, b, t, head, space.row(), space.row_bytes());
            bool raises = false;
            for (int64_t s = 0; s < p.selections; ++s) raises |= factor_of(p, b, t, s, head, scale) > 0.0f;
            if (raises) add_moments(space.row(), p.dim, basis->query_moments);
        }
    }
    for (int64_t i = 0; i < some_keys; ++i) {
        const int64_t at = i * keys / some_keys;
        const float scale = read_key(p, at / p.keys, at % p.keys, space.row());
        for (int64_t d = 0; d < p.dim; ++d) space.row()[d] *= scale;
        add_moments(space.row(), p.dim, basis->key_moments);
    }
    return basis->find();
}

void outline_keys(const Problem& p, const Workspace& space, const OutlineBasis& basis, int64_t item, float* outlines) {
    const int64_t end = smaller((item + 1) * kKeysToOutline, p.batch * p.keys);
    for (int64_t at = item * kKeysToOutline; at < end; ++at) {
        const float scale = read_key(p, at / p.keys, at % p.keys, space.row());
        basis.of_key(space.row(), scale, space.sums(), outlines + at * kOutline);
    }
}

}  // namespace

int index_topk(const dsa_index_topk_args& args) {
    const Problem p(args);
    if (!fit(p, args.key_start) || !fit(p, args.key_end)) return DSA_OUT_OF_RANGE;
    const int64_t items = p.batch * p.blocks * p.segments;
    if (items == 0) return DSA_OK;
    const int threads = static_cast<int>(larger<int64_t>(1, smaller<int64_t>(args.threads, items)));
    Workspace space(p);
    const int64_t list_count = p.segments > 1 ? p.batch * p.tokens * p.selections * p.segments : 0;
    const int64_t list_bytes = round_up(list_count * p.wanted * 4, 64);
    Scratch scratch(threads * space.bytes() + 2 * list_bytes + list_count * 8);
    if (scratch.failed()) return DSA_OUT_OF_MEMORY;
    char* shared = scratch.at<char>(threads * space.bytes());
    const Lists lists{reinterpret_cast<int32_t*>(shared), reinterpret_cast<int32_t*>(shared + list_bytes),
                      reinterpret_cast<int64_t*>(shared + 2 * list_bytes)};
    const auto workspace = [&](int worker) {
        Workspace mine = space;
        mine.use(scratch.at<char>(worker * space.bytes()));
        return mine;
    };
    Scratch outline_scratch(p.bounded ? p.batch * p.keys * kOutline * 4 : 0);
    Scratch basis_scratch(p.bounded ? OutlineBasis::bytes(p.dim) : 0);
    if (outline_scratch.failed() || basis_scratch.failed()) return DSA_OUT_OF_MEMORY;
    Outlines outlines{};
    OutlineBasis basis(p.dim, basis_scratch.at<double>());
    if (p.bounded && find_basis(p, workspace(0), &basis)) {
        for_each_item(ceil_div(p.batch * p.keys, kKeysToOutline), threads, [&](int64_t item, int worker) {
            outline_keys(p, workspace(worker), basis, item, outline_scratch.at<float>());
        });
        outlines = {&basis, outline_scratch.at<float>()};
    }
    for_each_item(items, threads, [&](int64_t item, int worker) {
        const auto scan = p.quantised ? (p.selections == 1 ? scan_block<Bytes, true> : scan_block<Bytes, false>)
                                      : (p.selections == 1 ? scan_block<Floats, true> : scan_block<Floats, false>);
        scan(p, workspace(worker), outlines, item, lists);
    });
    if (p.segments == 1) return DSA_OK;
    for_each_item(p.batch * p.tokens * p.selections, threads,
                  [&](int64_t item, int worker) { merge(p, workspace(worker), item, lists); });
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
