// Attention over selected tokens: a running softmax over tiles of 64 places. Interface: dsa/sparse_attention.h.
#include "dsa/sparse_attention.h"

#include "kernels/attention_state.h"

namespace dsa::DSA_ISA {
namespace {

// A block of queries walks its places in step, so that a row which several of them select is read from memory once: their
// places ascend, so the tokens of one step lie near each other even where neighbours share none. More queries share more,
// until rows and sums outgrow the caches.
constexpr int64_t kBlockBytes = 4 << 20;
constexpr int64_t kBlockQueries = 512;
// Where a query's sums are not that much smaller than the rows of a tile, as in MLA, they had better stay near.
constexpr int64_t kRowsOfSums = 4, kBlockBytesOfSums = 128 << 10;
// Neighbours that take turns on one row in the first caches, where they select mostly the same tokens.
constexpr int64_t kNeighbours = 16;
// What a few queries take at a time, where a token's row is so wide that 64 of them would crowd the first caches out.
constexpr int64_t kTileBytes = 128 << 10;
constexpr int64_t kFewShared = 8;
constexpr int64_t kWidestVector = 16;
// Rows of scores between scoring and mixing: the first cache holds them and the rows of a tile.
constexpr int64_t kScoreRows = 48;

struct Problem {
    const dsa_sparse_attention_args& args;
    int64_t batch, tokens, heads, dim, keys, groups, value_dim, places;
    int64_t shared;  // heads of one KV head
    StateShape shape;
    int64_t row_bytes;  // of a token's keys and values
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
          shape(heads, dim, value_dim),
          row_bytes(groups * (dim * bytes_of(args.k.dtype) + value_dim * bytes_of(args.v.dtype))),
          tile_places(kTileKeys),
          key_kernels(kRowKernels[args.k.dtype]),
          value_kernels(kRowKernels[args.v.dtype]) {
        if (batch * tokens < kPieces && shared <= kFewShared) {
            const int64_t fitting = smaller(kTileBytes / larger<int64_t>(row_bytes, 1), tile_places);
            tile_places = larger<int64_t>(fitting / kWidestVector * kWidestVector, kWidestVector);
        }
    }
};

struct Tile {
    int count;
    int32_t index[kTileKeys];
};

int64_t bytes_of_tiles(int64_t queries) { return 2 * (queries + 1) * static_cast<int64_t>(sizeof(Tile)); }

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

// Query heads [head, head + heads) of KV head `group`, of one query, over its tile.
struct Unit {
    int64_t query, group, head, heads;
};

// Scores every unit, then weighs, then mixes, so that units which share their rows find them in the first cache: keys and
// values together would not fit. `ahead[i]` is the unit after the i-th, whose rows are asked for meanwhile.
void attend_units(const Problem& p, int64_t b, const Tile* tiles, const Unit* units, const Unit* ahead, int count,
                  float* floats) {
    alignas(64) float scores[kScoreRows * kTileKeys];
    float correction[kScoreRows];
    // `pass(state, head, heads, keys, rows, rows to ask for, row of scores)`, as many heads at a time as registers hold.
    const auto each_pass = [&](const dsa_tensor& x, const auto& pass) {
        int64_t row = 0;
        for (int i = 0; i < count; ++i) {
            const Unit &unit = units[i], &next = ahead[i];
            const Tile &tile = tiles[unit.query], &coming = tiles[next.query];
            const bool asks = (next.query != unit.query || next.group != unit.group) && coming.count >= tile.count;
            const Rows rows = head_rows(x, b, unit.group, tile.index);
            Rows rows_ahead = head_rows(x, b, next.group, asks ? coming.index : nullptr);
            const State state(p.shape, floats + unit.query * p.shape.floats);
            for (int64_t h = unit.head, end = h + unit.heads; h < end;) {
                const int heads = rows_of_pass(end - h);
                pass(state, h, heads, tile.count, rows, rows_ahead, row);
                rows_ahead.index = nullptr;
                h += heads;
                row += heads;
            }
        }
    };
    const int64_t padded = p.shape.padded_dim, padded_value = p.shape.padded_value_dim;
    const auto score = [&](const State& state, int64_t h, int heads, int keys, Rows rows, Rows coming, int64_t row) {
        p.key_kernels.dot[heads](state.q + h * padded, padded, rows, keys, p.dim, scores + row * kTileKeys, kTileKeys, coming);
    };
    each_pass(p.args.k, score);
    for (int64_t i = 0, row = 0; i < count; ++i) {
        const State state(p.shape, floats + units[i].query * p.shape.floats);
        const int keys = tiles[units[i].query].count;
        for (int64_t h = units[i].head; h < units[i].head + units[i].heads; ++h, ++row)
            correction[row] = weigh(scores + row * kTileKeys, keys, p.args.softcap, state.top + h, state.total + h);
    }
    const auto mix = [&](const State& state, int64_t h, int heads, int keys, Rows rows, Rows coming, int64_t row) {
        p.value_kernels.mix[heads](scores + row * kTileKeys, kTileKeys, rows, keys, p.value_dim, correction + row,
                                   state.mixed + h * padded_value, padded_value, coming);
    };
    each_pass(p.args.v, mix);
}

// Queries [first, last) of a block over their tiles. Those that share their tokens take turns on one KV head, whose rows
// then stay in the first cache; others take all KV heads of their own tokens, which lie side by side.
void attend_neighbours(const Problem& p, int64_t b, const Tile* tiles, int64_t first, int64_t last, float* floats) {
    const int64_t queries = last - first;
    const bool alike = queries > 1 && overlap(tiles[first], tiles[last - 1]);
    const int64_t parts = ceil_div(p.shared, kScoreRows), steps = queries * p.groups * parts;
    const auto unit_at = [&](int64_t step) {
        const int64_t at = step / parts, part = step % parts;
        if (step == steps) return Unit{last, 0, 0, 0};
        const int64_t query = alike ? at % queries : at / p.groups, group = alike ? at / queries : at % p.groups;
        const int64_t from = part * p.shared / parts, to = (part + 1) * p.shared / parts;
        return Unit{first + query, group, group * p.shared + from, to - from};
    };
    Unit units[kScoreRows + 1];
    for (int64_t step = 0; step < steps;) {
        int count = 0;
        units[0] = unit_at(step);
        for (int64_t rows = 0; step < steps; units[count] = unit_at(step)) {
            const Unit& unit = units[count];
            if (rows + unit.heads > kScoreRows || (alike && unit.group != units[0].group)) break;
            ++step;
            if (tiles[unit.query].count == 0) continue;
            rows += unit.heads;
            ++count;
        }
        attend_units(p, b, tiles, units, units + 1, count, floats);
    }
}

// Queries [first, last) of batch row b over places [begin, end), in step: all of them over the first tile, then over the
// next. `floats` holds their states, `tiles` has room for twice one tile more than there are queries.
void attend(const Problem& p, int64_t b, int64_t first, int64_t last, int64_t begin, int64_t end, float* floats, Tile* tiles) {
    const dsa_tensor& indices = p.args.indices;
    const int64_t queries = last - first;
    bool outside = false;
    const auto select = [&](Tile* selected, int64_t place) {
        const int places = static_cast<int>(smaller(p.tile_places, end - place));
        for (int64_t t = first; t < last; ++t, ++selected) {
            const int64_t at = b * indices.stride[0] + t * indices.stride[1] + place;
            selected->count = select_places(static_cast<const int32_t*>(indices.data) + at, places, p.keys, selected->index,
                                            &outside);
        }
    };
    for (int64_t t = first; t < last; ++t)
        State(p.shape, floats + (t - first) * p.shape.floats).begin(p.shape, p.args.q, b, t, p.args.scale);
    Tile *tile = tiles, *after = tiles + queries + 1;
    if (begin < end) select(tile, begin);
    for (int64_t place = begin; place < end; place += p.tile_places) {
        if (place + p.tile_places < end)
            select(after, place + p.tile_places);
        else
            after[0].count = 0;
        tile[queries] = after[0];  // What the last query's rows ask for ahead.
        for (int64_t query = 0; query < queries; query += kNeighbours)
            attend_neighbours(p, b, tile, query, smaller(queries, query + kNeighbours), floats);
        Tile* free = tile;
        tile = after;
        after = free;
    }
    if (outside) __atomic_store_n(p.args.outside, 1, __ATOMIC_RELAXED);
}

}  // namespace

int sparse_attention(const dsa_sparse_attention_args& args) {
    const Problem p(args);
    const int64_t queries = p.batch * p.tokens;
    if (queries == 0) return DSA_OK;
    const double work = static_cast<double>(queries) * p.places * p.heads * (p.dim + p.value_dim);
    const int threads = work < kSerialWork ? 1 : args.threads;
    const StateShape& shape = p.shape;
    const int64_t pieces = pieces_of_query(p.places, queries);
    if (pieces == 1) {
        const bool small = kRowsOfSums * shape.floats * 4 <= kTileKeys * p.row_bytes;
        const int64_t fitting = smaller((small ? kBlockBytes : kBlockBytesOfSums) / (shape.floats * 4), kBlockQueries);
        const int64_t sharing = queries / (4 * larger(threads, 1));
        const int64_t block = larger<int64_t>(smaller(smaller(fitting, sharing), p.tokens), 1);
        const int64_t blocks = ceil_div(p.tokens, block), floats = block * shape.floats;
        const int64_t bytes = round_up(floats * 4 + bytes_of_tiles(block), 64);
        Scratch scratch(larger(threads, 1) * bytes);
        if (scratch.failed()) return DSA_OUT_OF_MEMORY;
        for_each_item(p.batch * blocks, threads, [&](int64_t item, int worker) {
            const int64_t b = item / blocks, first = item % blocks * block, last = smaller(first + block, p.tokens);
            float* states = scratch.at<float>(worker * bytes);
            attend(p, b, first, last, 0, p.places, states, scratch.at<Tile>(worker * bytes + floats * 4));
            for (int64_t t = first; t < last; ++t)
                State(shape, states + (t - first) * shape.floats).finish(shape, args.out, args.lse, args.sink_logits, b, t);
        });
        return DSA_OK;
    }
    const int64_t places = round_up(ceil_div(p.places, pieces), p.tile_places);
    Scratch scratch(queries * pieces * shape.floats * 4);
    if (scratch.failed()) return DSA_OUT_OF_MEMORY;
    const auto floats_of = [&](int64_t query, int64_t piece) {
        return scratch.at<float>() + (query * pieces + piece) * shape.floats;
    };
    for_each_item(queries * pieces, threads, [&](int64_t item, int) {
        const int64_t query = item / pieces, piece = item % pieces, b = query / p.tokens, t = query % p.tokens;
        const int64_t begin = smaller(piece * places, p.places), end = smaller(begin + places, p.places);
        Tile tiles[4];
        attend(p, b, t, t + 1, begin, end, floats_of(query, piece), tiles);
    });
    for (int64_t query = 0; query < queries; ++query) {
        State state(shape, floats_of(query, 0));
        for (int64_t piece = 1; piece < pieces; ++piece) state.merge(shape, State(shape, floats_of(query, piece)));
        state.finish(shape, args.out, args.lse, args.sink_logits, query / p.tokens, query % p.tokens);
    }
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
