// Attention over selected FP8 rows: a running softmax over tiles of 64 places. Interface: dsa/packed_latents.h.
//
// A tile's rows are decoded once into a buffer that stays in the cache, and all heads of the query read them there: with
// DeepSeek's 128 heads a number is decoded once for 128 times that it is multiplied.
#include "dsa/packed_latents.h"

#include "kernels/attention_state.h"
#include "kernels/packed_row.h"

namespace dsa::DSA_ISA {
namespace {

// Of decoded rows.
constexpr RowKernels kDecodedKernels = row_kernels<float>();

struct PackedProblem {
    const dsa_packed_attention_args& args;
    int64_t batch, tokens, heads, dim, latent_dim, keys, places;
    StateShape shape;
    int64_t tile_floats;  // of a tile's decoded rows

    explicit PackedProblem(const dsa_packed_attention_args& args)
        : args(args),
          batch(args.q.size[0]),
          tokens(args.q.size[1]),
          heads(args.q.size[2]),
          dim(args.q.size[3]),
          latent_dim(args.latent_dim),
          keys(args.rows.size[1]),
          places(args.indices.size[2]),
          shape(heads, dim, latent_dim),
          tile_floats(kTileKeys * shape.padded_dim) {}

    const uint8_t* row(int64_t b, int64_t s) const {
        return static_cast<const uint8_t*>(args.rows.data) + b * args.rows.stride[0] + s * args.rows.stride[1];
    }
};

// Query t of batch row b over places [begin, end). `decoded` holds a tile's rows.
void attend_packed(const PackedProblem& p, int64_t b, int64_t t, int64_t begin, int64_t end, State& state,
                   float* decoded) {
    const dsa_tensor& indices = p.args.indices;
    const int32_t* selected = static_cast<const int32_t*>(indices.data) + b * indices.stride[0] + t * indices.stride[1];
    const int64_t row_bytes = p.args.rows.size[2], padded_dim = p.shape.padded_dim, padded_latent = p.shape.padded_value_dim;
    int32_t order[kTileKeys], tile[kTileKeys];
    for (int i = 0; i < kTileKeys; ++i) order[i] = i;
    const Rows rows = {reinterpret_cast<const char*>(decoded), padded_dim * 4, order}, none = {nullptr, 0, nullptr};
    alignas(64) float scores[kRowsAtOnce * kTileKeys];
    float correction[kRowsAtOnce];
    const RowKernels& kernels = kDecodedKernels;
    bool outside = false;
    state.begin(p.shape, p.args.q, b, t, p.args.scale);
    for (int64_t place = begin; place < end; place += kTileKeys) {
        const int places = static_cast<int>(smaller<int64_t>(kTileKeys, end - place));
        const int count = select_places(selected + place, places, p.keys, tile, &outside);
        if (count == 0) continue;
        const int padded = static_cast<int>(round_up(count, kWidth));
        for (int i = 0; i < padded; ++i) {
            if (i + 2 < padded) prefetch_row(reinterpret_cast<const char*>(p.row(b, tile[i + 2])), row_bytes);
            float* into = decoded + i * padded_dim;
            decode_row(p.row(b, tile[i]), p.latent_dim, p.dim - p.latent_dim, into);
        }
        for (int64_t h = 0; h < p.heads;) {
            const int heads = rows_of_pass(p.heads - h);
            kernels.dot[heads](state.q + h * padded_dim, padded_dim, rows, count, p.dim, scores, kTileKeys, none);
            for (int r = 0; r < heads; ++r)
                correction[r] =
                    weigh(scores + r * kTileKeys, count, p.args.softcap, state.top + h + r, state.total + h + r);
            kernels.mix[heads](scores, kTileKeys, rows, count, p.latent_dim, correction,
                               state.mixed + h * padded_latent, padded_latent, none);
            h += heads;
        }
    }
    if (outside) __atomic_store_n(p.args.outside, 1, __ATOMIC_RELAXED);
}

}  // namespace

int packed_attention(const dsa_packed_attention_args& args) {
    const PackedProblem p(args);
    const int64_t queries = p.batch * p.tokens;
    if (queries == 0) return DSA_OK;
    const double work = static_cast<double>(queries) * p.places * p.heads * (p.dim + p.latent_dim);
    const int threads = work < kSerialWork ? 1 : larger(args.threads, 1);
    const int64_t pieces = pieces_of_query(p.places, queries);
    const int64_t places = round_up(ceil_div(p.places, pieces), kTileKeys);
    // Pieces of one query are all kept until they are merged; whole queries are finished one after the other.
    const int64_t states = pieces == 1 ? threads : queries * pieces;
    Scratch scratch((states * p.shape.floats + threads * p.tile_floats) * 4);
    if (scratch.failed()) return DSA_OUT_OF_MEMORY;
    const auto state_at = [&](int64_t at) { return State(p.shape, scratch.at<float>() + at * p.shape.floats); };
    float* tiles = scratch.at<float>() + states * p.shape.floats;
    for_each_item(queries * pieces, threads, [&](int64_t item, int worker) {
        const int64_t query = item / pieces, piece = item % pieces, b = query / p.tokens, t = query % p.tokens;
        const int64_t begin = smaller(piece * places, p.places), end = smaller(begin + places, p.places);
        State state = state_at(pieces == 1 ? worker : item);
        attend_packed(p, b, t, begin, end, state, tiles + worker * p.tile_floats);
        if (pieces == 1) state.finish(p.shape, args.out, args.lse, args.sink_logits, b, t);
    });
    if (pieces == 1) return DSA_OK;
    for (int64_t query = 0; query < queries; ++query) {
        State state = state_at(query * pieces);
        for (int64_t piece = 1; piece < pieces; ++piece) state.merge(p.shape, state_at(query * pieces + piece));
        state.finish(p.shape, args.out, args.lse, args.sink_logits, query / p.tokens, query % p.tokens);
    }
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
