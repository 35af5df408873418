// Attention over selected FP8 rows: a running softmax over tiles of 64 places. Interface: dsa/packed_latents.h.
//
// A tile's rows are decoded once into a buffer that stays in the cache, and all heads of the query read them there: with
// DeepSeek's 128 heads a number is decoded once for 128 times that it is multiplied.
#include "dsa/packed_latents.h"

#include "kernels/packed_row.h"
#include "kernels/sparse_attention_tile.h"

namespace dsa::DSA_ISA {
namespace {

// One call on one thread costs less than waking another, below this many multiply-adds.
constexpr double kSerialPackedWork = 400e3;
// Queries that are too few to be shared among threads are cut into pieces of this many places.
constexpr int64_t kPlacesOfPiece = 128;
constexpr int64_t kMostPieces = 64;
// Of decoded rows.
constexpr RowKernels kDecodedKernels = row_kernels<float>();

struct PackedProblem {
    const dsa_packed_attention_args& args;
    int64_t batch, tokens, heads, dim, latent_dim, keys, places;
    int64_t padded_dim, padded_latent;  // whole vectors
    int64_t state_floats, tile_floats;  // of one query, and of a tile's decoded rows

    explicit PackedProblem(const dsa_packed_attention_args& args)
        : args(args),
          batch(args.q.size[0]),
          tokens(args.q.size[1]),
          heads(args.q.size[2]),
          dim(args.q.size[3]),
          latent_dim(args.latent_dim),
          keys(args.rows.size[1]),
          places(args.indices.size[2]),
          padded_dim(round_up(dim, kWidth)),
          padded_latent(round_up(latent_dim, kWidth)),
          state_floats(round_up(heads * (padded_dim + padded_latent + 2), 16)),
          tile_floats(kTileKeys * padded_dim) {}

    const uint8_t* row(int64_t b, int64_t s) const {
        return static_cast<const uint8_t*>(args.rows.data) + b * args.rows.stride[0] + s * args.rows.stride[1];
    }
};

// What one query keeps between tiles: its packed heads, and for each head the weighted sum of latents, the largest score
// and the sum of the weights, which are relative to it.
struct PackedState {
    float *q, *mixed, *top, *total;

    PackedState(const PackedProblem& p, float* floats)
        : q(floats),
          mixed(q + p.heads * p.padded_dim),
          top(mixed + p.heads * p.padded_latent),
          total(top + p.heads) {}

    void begin(const PackedProblem& p, int64_t b, int64_t t) {
        pack_heads(p.args.q, b, t, p.args.scale, q);
        memset(mixed, 0, static_cast<size_t>(p.heads * p.padded_latent) * 4);
        for (int64_t h = 0; h < p.heads; ++h) top[h] = -INFINITY, total[h] = 0.0f;
    }
};

// Query t of batch row b over places [begin, end). `decoded` holds a tile's rows.
void attend_packed(const PackedProblem& p, int64_t b, int64_t t, int64_t begin, int64_t end, PackedState& state,
                   float* decoded) {
    const dsa_tensor& indices = p.args.indices;
    const int32_t* selected = static_cast<const int32_t*>(indices.data) + b * indices.stride[0] + t * indices.stride[1];
    const int64_t row_bytes = p.args.rows.size[2];
    int32_t order[kTileKeys], tile[kTileKeys];
    for (int i = 0; i < kTileKeys; ++i) order[i] = i;
    const Rows rows = {reinterpret_cast<const char*>(decoded), p.padded_dim * 4, order}, none = {nullptr, 0, nullptr};
    alignas(64) float scores[kRowsAtOnce * kTileKeys];
    float correction[kRowsAtOnce];
    const RowKernels& kernels = kDecodedKernels;
    bool outside = false;
    state.begin(p, b, t);
    for (int64_t place = begin; place < end; place += kTileKeys) {
        const int places = static_cast<int>(smaller<int64_t>(kTileKeys, end - place));
        const int count = select_places(selected + place, places, p.keys, tile, &outside);
        if (count == 0) continue;
        const int padded = static_cast<int>(round_up(count, kWidth));
        for (int i = 0; i < padded; ++i) {
            if (i + 2 < padded) prefetch_row(reinterpret_cast<const char*>(p.row(b, tile[i + 2])), row_bytes);
            float* into = decoded + i * p.padded_dim;
            decode_row(p.row(b, tile[i]), p.latent_dim, p.dim - p.latent_dim, into);
        }
        for (int64_t h = 0; h < p.heads;) {
            const int heads = rows_of_pass(p.heads - h);
            kernels.dot[heads](state.q + h * p.padded_dim, p.padded_dim, rows, count, p.dim, scores, kTileKeys, none);
            for (int r = 0; r < heads; ++r)
                correction[r] =
                    weigh(scores + r * kTileKeys, count, p.args.softcap, state.top + h + r, state.total + h + r);
            kernels.mix[heads](scores, kTileKeys, rows, count, p.latent_dim, correction,
                               state.mixed + h * p.padded_latent, p.padded_latent, none);
            h += heads;
        }
    }
    if (outside) __atomic_store_n(p.args.outside, 1, __ATOMIC_RELAXED);
}

// Adds the sums of another piece of the same query's places.
void merge_packed(const PackedProblem& p, PackedState& state, const PackedState& other) {
    for (int64_t h = 0; h < p.heads; ++h) {
        const float top = larger(state.top[h], other.top[h]), origin = finite_or_zero(top);
        const float mine = expf(state.top[h] - origin), theirs = expf(other.top[h] - origin);
        state.top[h] = top;
        state.total[h] = state.total[h] * mine + other.total[h] * theirs;
        float* mixed = state.mixed + h * p.padded_latent;
        const float* more = other.mixed + h * p.padded_latent;
        const F32 a = broadcast(mine), b = broadcast(theirs);
        for (int64_t i = 0; i < p.padded_latent; i += kWidth)
            store(mixed + i, fma(load(more + i), b, load(mixed + i) * a));
    }
}

void finish_packed(const PackedProblem& p, int64_t b, int64_t t, PackedState& state) {
    const dsa_tensor &out = p.args.out, &lse = p.args.lse, &sink = p.args.sink_logits;
    for (int64_t h = 0; h < p.heads; ++h) {
        const float origin = finite_or_zero(state.top[h]);
        float total = state.total[h];
        static_cast<float*>(lse.data)[b * lse.stride[0] + t * lse.stride[1] + h * lse.stride[2]] = logf(total) + origin;
        if (sink.data) total += expf(element(sink, h * sink.stride[0]) - origin);
        const F32 divisor = broadcast(total == 0.0f ? 1.0f : total);
        float* mixed = state.mixed + h * p.padded_latent;
        for (int64_t i = 0; i < p.padded_latent; i += kWidth) store(mixed + i, load(mixed + i) / divisor);
        store_row(out, b * out.stride[0] + t * out.stride[1] + h * out.stride[2], p.latent_dim, mixed);
    }
}

}  // namespace

int packed_attention(const dsa_packed_attention_args& args) {
    const PackedProblem p(args);
    const int64_t queries = p.batch * p.tokens;
    if (queries == 0) return DSA_OK;
    const double work = static_cast<double>(queries) * p.places * p.heads * (p.dim + p.latent_dim);
    const int threads = work < kSerialPackedWork ? 1 : larger(args.threads, 1);
    // Depends on the shape alone, so that the result does not depend on the number of threads.
    const int64_t pieces =
        smaller(larger<int64_t>(ceil_div(p.places, kPlacesOfPiece), 1), larger<int64_t>(kMostPieces / queries, 1));
    const int64_t places = round_up(ceil_div(p.places, pieces), kTileKeys);
    // Pieces of one query are all kept until they are merged; whole queries are finished one after the other.
    const int64_t states = pieces == 1 ? threads : queries * pieces;
    Scratch scratch((states * p.state_floats + threads * p.tile_floats) * 4);
    if (scratch.failed()) return DSA_OUT_OF_MEMORY;
    const auto state_at = [&](int64_t at) { return PackedState(p, scratch.at<float>() + at * p.state_floats); };
    float* tiles = scratch.at<float>() + states * p.state_floats;
    for_each_item(queries * pieces, threads, [&](int64_t item, int worker) {
        const int64_t query = item / pieces, piece = item % pieces, b = query / p.tokens, t = query % p.tokens;
        const int64_t begin = smaller(piece * places, p.places), end = smaller(begin + places, p.places);
        PackedState state = state_at(pieces == 1 ? worker : item);
        attend_packed(p, b, t, begin, end, state, tiles + worker * p.tile_floats);
        if (pieces == 1) finish_packed(p, b, t, state);
    });
    if (pieces == 1) return DSA_OK;
    for (int64_t query = 0; query < queries; ++query) {
        PackedState state = state_at(query * pieces);
        for (int64_t piece = 1; piece < pieces; ++piece) merge_packed(p, state, state_at(query * pieces + piece));
        finish_packed(p, query / p.tokens, query % p.tokens, state);
    }
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
