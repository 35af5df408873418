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

struct Problem {
    const dsa_sparse_attention_args& args;
    int64_t batch, tokens, heads, dim, keys, groups, value_dim, places;
    int64_t shared, padded_dim, padded_value_dim;  // heads of one KV head; whole vectors
    int64_t state_floats;                          // of one query
    int64_t key_stride, value_stride;              // bytes
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
          key_stride(args.k.stride[1] * bytes_of(args.k.dtype)),
          value_stride(args.v.stride[1] * bytes_of(args.v.dtype)),
          key_kernels(kRowKernels[args.k.dtype]),
          value_kernels(kRowKernels[args.v.dtype]) {}
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
    int64_t key[kTileKeys], value[kTileKeys];
};

DSA_INLINE float finite_or_zero(float top) { return top == -INFINITY ? 0.0f : top; }

// Turns the scores of a tile into weights relative to the largest score so far. Returns the factor that makes earlier
// weights so. A score of NaN or +infinity makes the weights and their sum NaN, as a softmax does.
DSA_INLINE float weigh(float* scores, int keys, float softcap, float* top, float* total) {
    const int padded = static_cast<int>(round_up(keys, kWidth));
    F32 best = broadcast(-INFINITY);
    if (softcap != 0.0f) {
        const F32 cap = broadcast(softcap);
        for (int i = 0; i < padded; i += kWidth) store(scores + i, cap * tanh(load(scores + i) / cap));
    }
    for (int i = keys; i < padded; ++i) scores[i] = -INFINITY;
    for (int i = 0; i < padded; i += kWidth) best = max(load(scores + i), best);
    const float before = *top, now = larger(before, reduce_max(best));
    const F32 origin = broadcast(finite_or_zero(now));
    F32 sum = zero();
    for (int i = 0; i < padded; i += kWidth) {
        const F32 weight = exp(load(scores + i) - origin);
        store(scores + i, weight);
        sum += weight;
    }
    float correction = 1.0f;
    if (now != before) {
        float lanes[kWidth];
        store(lanes, exp(broadcast(before) - origin));
        correction = lanes[0];
    }
    *top = now;
    *total = *total * correction + reduce_add(sum);
    return correction;
}

// One query over one tile; `next` is the tile that comes after it, whose rows are asked for meanwhile.
void attend_tile(const Problem& p, State& state, int64_t b, const Tile& tile, const Tile* next) {
    alignas(64) float scores[kRowsAtOnce * kTileKeys];
    float correction[kRowsAtOnce];
    for (int64_t g = 0; g < p.groups; ++g) {
        const Rows keys{head_rows(p.args.k, b, g), tile.key}, values{head_rows(p.args.v, b, g), tile.value};
        const bool last_head = g + 1 == p.groups;
        const int64_t next_head = last_head ? 0 : g + 1;
        const Tile* coming = last_head ? next : &tile;
        Rows keys_ahead{head_rows(p.args.k, b, next_head), coming ? coming->key : nullptr};
        Rows values_ahead{head_rows(p.args.v, b, next_head), coming ? coming->value : nullptr};
        if (coming && coming->count < tile.count) keys_ahead.offset = values_ahead.offset = nullptr;
        int64_t end = (g + 1) * p.shared;
        for (int64_t h = g * p.shared; h < end;) {
            const int rows = rows_of_pass(end - h);
            p.key_kernels.dot[rows](state.q + h * p.padded_dim, p.padded_dim, keys, tile.count, p.dim, scores, kTileKeys,
                                    keys_ahead);
            for (int r = 0; r < rows; ++r)
                correction[r] =
                    weigh(scores + r * kTileKeys, tile.count, p.args.softcap, state.top + h + r, state.total + h + r);
            p.value_kernels.mix[rows](scores, kTileKeys, values, tile.count, p.value_dim, correction,
                                      state.mixed + h * p.padded_value_dim, p.padded_value_dim, values_ahead);
            keys_ahead.offset = values_ahead.offset = nullptr;
            h += rows;
        }
    }
}

// Queries [first, last) of batch row b over places [begin, end), in step. `floats` holds their states.
void attend(const Problem& p, int64_t b, int64_t first, int64_t last, int64_t begin, int64_t end, float* floats) {
    for (int64_t t = first; t < last; ++t) State(p, floats + (t - first) * p.state_floats).begin(p, b, t);
    const int64_t queries = last - first, steps = ceil_div(end - begin, kTileKeys) * queries;
    const dsa_tensor& indices = p.args.indices;
    bool outside = false;
    Tile tiles[2];
    const auto prepare = [&](int64_t step) {
        const int64_t t = first + step % queries, place = begin + step / queries * kTileKeys;
        const int32_t* chosen =
            static_cast<const int32_t*>(indices.data) + b * indices.stride[0] + t * indices.stride[1] + place;
        Tile& tile = tiles[step & 1];
        int32_t rows[kTileKeys];
        tile.count = select_places(chosen, static_cast<int>(smaller<int64_t>(kTileKeys, end - place)), p.keys, rows, &outside);
        locate_rows(rows, tile.count, p.key_stride, tile.key);
        locate_rows(rows, tile.count, p.value_stride, tile.value);
    };
    if (steps > 0) prepare(0);
    for (int64_t step = 0; step < steps; ++step) {
        const bool more = step + 1 < steps;
        if (more) prepare(step + 1);
        if (tiles[step & 1].count == 0) continue;
        State state(p, floats + step % queries * p.state_floats);
        attend_tile(p, state, b, tiles[step & 1], more ? &tiles[(step + 1) & 1] : nullptr);
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
    const int64_t places = round_up(ceil_div(p.places, pieces), kTileKeys);
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
