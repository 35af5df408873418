// Attention over selected tokens: a running softmax over tiles of 64 places. Interface: dsa/sparse_attention.h.
#include "dsa/sparse_attention.h"

#include "kernels/sparse_attention_tile.h"

namespace dsa::DSA_ISA {
namespace {

// One call on one thread costs less than waking another, below this many multiply-adds.
constexpr double kSerialWork = 400e3;
// Queries that are too few to be shared among threads are cut into pieces of this many places.
constexpr int64_t kPiecePlaces = 128;
constexpr int64_t kPieces = 64;
// Neighbouring queries select mostly the same tokens: a block of them walks its places in step, so that a row is still
// in the cache when the next query comes for it. More than this do not fit it beside the rows.
constexpr int64_t kBlockBytes = 128 << 10;
constexpr int64_t kBlockQueries = 16;
// What a few queries take at a time, where a token's row is so wide that 64 of them would crowd the first caches out.
constexpr int64_t kTileBytes = 128 << 10;
constexpr int64_t kFewShared = 8;
constexpr int64_t kWidestVector = 16;

struct Problem {
    const dsa_sparse_attention_args& args;
    int64_t batch, tokens, heads, dim, keys, groups, value_dim, places;
    int64_t shared, padded_dim, padded_value_dim;  // heads of one KV head; whole vectors
    int64_t state_floats;                          // of one query
    int64_t tile_places;
    const RowKernels &key_kernels, &value_kernels;

    explicit Problem(const dsa_sparse_attention_args& args)
        : args(args),
          batch(args.q.size[0]),
          tokens(args.q.size[1]),
          heads(args.q.size[2]),
          dim(args.q.size[3]),
          keys(args.k.size[1]),
          groups(args.k.size[2]),
          value_dim(args.v.size[3]),
          places(args.indices.size[2]),
          shared(heads / groups),
          padded_dim(round_up(dim, kWidth)),
          padded_value_dim(round_up(value_dim, kWidth)),
          state_floats(round_up(heads * (padded_dim + padded_value_dim + 2), 16)),
          tile_places(kTileKeys),
          key_kernels(kRowKernels[args.k.dtype]),
          value_kernels(kRowKernels[args.v.dtype]) {
        const int64_t row = groups * (dim * bytes_of(args.k.dtype) + value_dim * bytes_of(args.v.dtype));
        if (batch * tokens < kPieces && shared <= kFewShared)
            tile_places = larger<int64_t>(smaller(kTileBytes / larger<int64_t>(row, 1), tile_places) / kWidestVector * kWidestVector, kWidestVector);
    }
};

// What one query keeps between tiles: its packed heads, and for each head the weighted sum of values, the largest score
// and the sum of the weights, which are relative to it.
struct State {
    float *q, *mixed, *top, *total;

    State(const Problem& p, float* floats)
        : q(floats),
          mixed(q + p.heads * p.padded_dim),
          top(mixed + p.heads * p.padded_value_dim),
          total(top + p.heads) {}

    void begin(const Problem& p, int64_t b, int64_t t) {
        pack_heads(p.args.q, b, t, p.args.scale, q);
        memset(mixed, 0, static_cast<size_t>(p.heads * p.padded_value_dim) * 4);
        for (int64_t h = 0; h < p.heads; ++h) top[h] = -INFINITY, total[h] = 0.0f;
    }
};

struct Tile {
    int count;
    int32_t index[kTileKeys];
};

// Whether two queries have most tokens of their tiles in common, for tiles in ascending order. Says no where they are
// in another order, which costs time only.
bool overlap(const Tile& a, const Tile& b) {
    int common = 0;
    for (int i = 0, j = 0; i < a.count && j < b.count;) {
        const int32_t x = a.index[i], y = b.index[j];
        common += x == y;
        i += x <= y;
        j += y <= x;
    }
    return 2 * common > a.count;
}

// One query's heads of KV head `g` over one tile. The rows of KV head `next_g` in `next` are asked for meanwhile.
void attend_tile(const Problem& p, State& state, int64_t b, int64_t g, const Tile& tile, int64_t next_g, const Tile& next) {
    alignas(64) float scores[kRowsAtOnce * kTileKeys];
    float correction[kRowsAtOnce];
    const Rows keys = head_rows(p.args.k, b, g, tile.index), values = head_rows(p.args.v, b, g, tile.index);
    const int32_t* coming = next.count >= tile.count ? next.index : nullptr;
    Rows keys_ahead = head_rows(p.args.k, b, next_g, coming), values_ahead = head_rows(p.args.v, b, next_g, coming);
    const int64_t end = (g + 1) * p.shared;
    for (int64_t h = g * p.shared; h < end;) {
        const int rows = rows_of_pass(end - h);
        p.key_kernels.dot[rows](state.q + h * p.padded_dim, p.padded_dim, keys, tile.count, p.dim, scores, kTileKeys,
                                keys_ahead);
        for (int r = 0; r < rows; ++r)
            correction[r] =
                weigh(scores + r * kTileKeys, tile.count, p.args.softcap, state.top + h + r, state.total + h + r);
        p.value_kernels.mix[rows](scores, kTileKeys, values, tile.count, p.value_dim, correction,
                                  state.mixed + h * p.padded_value_dim, p.padded_value_dim, values_ahead);
        keys_ahead.index = values_ahead.index = nullptr;
        h += rows;
    }
}

// Queries [first, last) of batch row b over places [begin, end), in step: all of them over the first tile, then over the
// next. `floats` holds their states.
void attend(const Problem& p, int64_t b, int64_t first, int64_t last, int64_t begin, int64_t end, float* floats) {
    const dsa_tensor& indices = p.args.indices;
    const int64_t queries = last - first;
    bool outside = false;
    // One tile more than there are queries: the first one's next.
    Tile tiles[2][kBlockQueries + 1];
    const auto select = [&](Tile* selected, int64_t place) {
        const int places = static_cast<int>(smaller(p.tile_places, end - place));
        for (int64_t t = first; t < last; ++t, ++selected) {
            const int64_t at = b * indices.stride[0] + t * indices.stride[1] + place;
            selected->count = select_places(static_cast<const int32_t*>(indices.data) + at, places, p.keys, selected->index,
                                            &outside);
        }
    };
    for (int64_t t = first; t < last; ++t) State(p, floats + (t - first) * p.state_floats).begin(p, b, t);
    Tile *tile = tiles[0], *after = tiles[1];
    if (begin < end) select(tile, begin);
    for (int64_t place = begin; place < end; place += p.tile_places) {
        if (place + p.tile_places < end)
            select(after, place + p.tile_places);
        else
            after[0].count = 0;
        tile[queries] = after[0];
        // Queries that share their tokens take turns on one KV head, whose rows then stay in the first cache; others take
        // all KV heads of their own tokens, which lie side by side.
        const bool alike = queries > 1 && overlap(tile[0], tile[queries - 1]);
        const int64_t units = queries * p.groups;
        for (int64_t unit = 0; unit < units; ++unit) {
            const auto query_of = [&](int64_t at) { return alike && at < units ? at % queries : at / p.groups; };
            const auto head_of = [&](int64_t at) { return alike ? at / queries % p.groups : at % p.groups; };
            const int64_t query = query_of(unit);
            if (tile[query].count == 0) continue;
            State state(p, floats + query * p.state_floats);
            attend_tile(p, state, b, head_of(unit), tile[query], head_of(unit + 1), tile[query_of(unit + 1)]);
        }
        Tile* free = tile;
        tile = after;
        after = free;
    }
    if (outside) __atomic_store_n(p.args.outside, 1, __ATOMIC_RELAXED);
}

// Adds the sums of another piece of the same query's places.
void merge(const Problem& p, State& state, const State& other) {
    for (int64_t h = 0; h < p.heads; ++h) {
        const float top = larger(state.top[h], other.top[h]), origin = finite_or_zero(top);
        const float mine = expf(state.top[h] - origin), theirs = expf(other.top[h] - origin);
        state.top[h] = top;
        state.total[h] = state.total[h] * mine + other.total[h] * theirs;
        float* mixed = state.mixed + h * p.padded_value_dim;
        const float* more = other.mixed + h * p.padded_value_dim;
        const F32 a = broadcast(mine), b = broadcast(theirs);
        for (int64_t i = 0; i < p.padded_value_dim; i += kWidth)
            store(mixed + i, fma(load(more + i), b, load(mixed + i) * a));
    }
}

void finish(const Problem& p, int64_t b, int64_t t, State& state) {
    const dsa_tensor &out = p.args.out, &lse = p.args.lse, &sink = p.args.sink_logits;
    for (int64_t h = 0; h < p.heads; ++h) {
        const float origin = finite_or_zero(state.top[h]);
        float total = state.total[h];
        static_cast<float*>(lse.data)[b * lse.stride[0] + t * lse.stride[1] + h * lse.stride[2]] = logf(total) + origin;
        if (sink.data) total += expf(element(sink, h * sink.stride[0]) - origin);
        const F32 divisor = broadcast(total == 0.0f ? 1.0f : total);
        float* mixed = state.mixed + h * p.padded_value_dim;
        for (int64_t i = 0; i < p.padded_value_dim; i += kWidth) store(mixed + i, load(mixed + i) / divisor);
        store_row(out, b * out.stride[0] + t * out.stride[1] + h * out.stride[2], p.value_dim, mixed);
    }
}

}  // namespace

int sparse_attention(const dsa_sparse_attention_args& args) {
    const Problem p(args);
    const int64_t queries = p.batch * p.tokens;
    if (queries == 0) return DSA_OK;
    const double work = static_cast<double>(queries) * p.places * p.heads * (p.dim + p.value_dim);
    const int threads = work < kSerialWork ? 1 : args.threads;
    // Depends on the shape alone, so that the result does not depend on the number of threads.
    const int64_t pieces = smaller(larger<int64_t>(ceil_div(p.places, kPiecePlaces), 1), larger<int64_t>(kPieces / queries, 1));
    if (pieces == 1) {
        const int64_t fitting = smaller(kBlockBytes / (p.state_floats * 4), kBlockQueries);
        const int64_t sharing = queries / (4 * larger(threads, 1));
        const int64_t block = larger<int64_t>(smaller(smaller(fitting, sharing), p.tokens), 1);
        const int64_t blocks = ceil_div(p.tokens, block), floats = block * p.state_floats;
        Scratch scratch(larger(threads, 1) * floats * 4);
        if (scratch.failed()) return DSA_OUT_OF_MEMORY;
        for_each_item(p.batch * blocks, threads, [&](int64_t item, int worker) {
            const int64_t b = item / blocks, first = item % blocks * block, last = smaller(first + block, p.tokens);
            float* states = scratch.at<float>() + worker * floats;
            attend(p, b, first, last, 0, p.places, states);
            for (int64_t t = first; t < last; ++t) {
                State state(p, states + (t - first) * p.state_floats);
                finish(p, b, t, state);
            }
        });
        return DSA_OK;
    }
    const int64_t places = round_up(ceil_div(p.places, pieces), p.tile_places);
    Scratch scratch(queries * pieces * p.state_floats * 4);
    if (scratch.failed()) return DSA_OUT_OF_MEMORY;
    const auto states = [&](int64_t query, int64_t piece) {
        return scratch.at<float>() + (query * pieces + piece) * p.state_floats;
    };
    for_each_item(queries * pieces, threads, [&](int64_t item, int) {
        const int64_t query = item / pieces, piece = item % pieces, b = query / p.tokens, t = query % p.tokens;
        const int64_t begin = smaller(piece * places, p.places), end = smaller(begin + places, p.places);
        attend(p, b, t, t + 1, begin, end, states(query, piece));
    });
    for (int64_t query = 0; query < queries; ++query) {
        State state(p, states(query, 0));
        for (int64_t piece = 1; piece < pieces; ++piece) merge(p, state, State(p, states(query, piece)));
        finish(p, query / p.tokens, query % p.tokens, state);
    }
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
