// Dense attention, backward. Interface: dsa/dense_attention.h; how it works: src/dsa/ops/dense_attention/README.md.
//
// Two passes, each of which owns what it writes: one over tiles of queries for their gradients, one over tiles of
// keys for those of keys and values. Probabilities are computed in both. No sum depends on the number of threads.
#include "kernels/dense_attention_tiles.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int64_t kTileBytes = 384 << 10;  // of one tile's operands and sums
constexpr int64_t kSmallestTile = 56;      // rows; fewer do not pay for packing the other side
constexpr int64_t kItemsWanted = 32;
constexpr int64_t kSmallWork = 200000;  // multiply-adds that are not worth another thread
constexpr int64_t kBlockRows = kBlockKeys;

struct Backward {
    const dsa_dense_attention_backward_args& args;
    Shape shape;
    int64_t dim_step, value_step;      // distance between rows of sums
    float factor, softcap;             // on q . k
    int64_t query_rows;                // of one KV head: tokens x query heads that share it

    explicit Backward(const dsa_dense_attention_backward_args& a)
        : args(a), shape(a.forward), dim_step(round_up(shape.dim, kPanel)),
          value_step(round_up(shape.value_dim, kPanel)),
          factor(score_factor(a.forward)), softcap(a.forward.softcap), query_rows(shape.tokens * shape.shared) {}

    // Rows of a tile, so that it fits the cache and many threads find work.
    int64_t tile_rows(int64_t rows) const {
        const int64_t fitting = kTileBytes / (8 * (shape.dim + shape.value_dim));
        const int64_t wanted = larger(kSmallestTile, shape.batch * shape.groups * rows / kItemsWanted);
        return round_up(larger<int64_t>(1, smaller(fitting, wanted)), kStripRows);
    }

    int threads() const {
        const int64_t work = shape.batch * shape.tokens * shape.heads * shape.keys * (shape.dim + shape.value_dim);
        return static_cast<int>(larger<int64_t>(1, smaller<int64_t>(args.forward.threads, 1 + work / kSmallWork)));
    }

    // What the rows [first, first + count) of a KV head's queries see, and their terms of the softmax.
    void read_rows(int64_t b, int64_t group, int64_t first, int64_t count, int64_t* low, int64_t* high,
                   float* normaliser, float* mean) const {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t t = (first + i) / shape.shared, head = group * shape.shared + (first + i) % shape.shared;
            shape.visible(b, t, low + i, high + i);
            const float value = *place<float>(args.normaliser, b, t, head);
            normaliser[i] = value == -INFINITY ? 0.0f : value * kLog2E;
            mean[i] = *place<float>(args.mean, b, t, head);
        }
    }

    // From scores to weights and gradients of the scores, both sides given; `scores` may hold the weights after.
    DSA_INLINE void differentiate(F32 score, F32 grad, F32 normaliser, F32 mean, F32* weight, F32* grad_score) const {
        F32 slope = broadcast(1.0f);
        if (softcap != 0.0f) {
            score = tanh(score / broadcast(softcap));
            slope = slope - score * score;
            score = score * broadcast(softcap * kLog2E);
        }
        // No probability is above 1. Of scores that are large the normaliser has lost the places that say so.
        *weight = exp2_of_negative(min(zero(), score - normaliser));
        *grad_score = *weight * (grad - mean);
        if (softcap != 0.0f) *grad_score *= slope;
    }
};

// The products of attend_strip and its like over one block: rows of weights [kStripRows][kBlockKeys] times packed
// rows. `seen(row, term)` says which terms count, where what is packed is not finite.
template <class Seen>
void add_product(const float* weights, int64_t begin, int64_t end, const float* packed, bool finite, int64_t step,
                 float* sum, const Seen& seen) {
    float ones[kStripRows];
    for (float& one : ones) one = 1.0f;
    for (int64_t c = 0; c < step; c += kPanel) {
        const float* panel = packed + c * kBlockRows;
        if (finite) {
            multiply<kBlockKeys, 1, true>(weights + begin, panel + begin * kPanel, end - begin, sum + c, step, ones);
            continue;
        }
        for (int64_t row = 0; row < kStripRows; ++row)
            for (int64_t term = begin; term < end; ++term)
                for (int64_t part = 0; seen(row, term) && part < kPanel; ++part)
                    sum[row * step + c + part] += weights[row * kBlockKeys + term] * panel[term * kPanel + part];
    }
}

void write_means(const Backward& all, int64_t b, int64_t t) {
    const dsa_tensor &grad = all.args.grad_out, &out = all.args.forward.out;
    with_type(grad.dtype, [&](auto* grad_type) {
        with_type(out.dtype, [&](auto* out_type) {
            for (int64_t head = 0; head < all.shape.heads; ++head) {
                const auto* x = place<std::remove_pointer_t<decltype(grad_type)>>(grad, b, t, head);
                const auto* y = place<std::remove_pointer_t<decltype(out_type)>>(out, b, t, head);
                float sum = 0.0f;
                for (int64_t c = 0; c < all.shape.value_dim; ++c) sum += widen(x[c * grad.stride[3]]) * widen(y[c]);
                *place<float>(all.args.mean, b, t, head) = sum;
            }
        });
    });
}

// Gradients of a tile of queries.
struct QueryTile {
    int64_t capacity;
    float *q, *grad_out, *sum, *normaliser, *mean, *keys, *values, *key_rows, *scores, *grads;
    int64_t *low, *high;

    QueryTile(const Backward& all, int64_t rows, Arena& arena)
        : capacity(round_up(rows, kStripRows)), q(arena.take<float>(capacity * all.shape.dim)),
          grad_out(arena.take<float>(capacity * all.shape.value_dim)), sum(arena.take<float>(capacity * all.dim_step)),
          normaliser(arena.take<float>(capacity)), mean(arena.take<float>(capacity)),
          keys(arena.take<float>(kBlockKeys * all.shape.dim)),
          values(arena.take<float>(kBlockKeys * all.shape.value_dim)),
          key_rows(arena.take<float>(kBlockKeys * all.dim_step)), scores(arena.take<float>(kStripRows * kBlockKeys)),
          grads(arena.take<float>(kStripRows * kBlockKeys)), low(arena.take<int64_t>(capacity)),
          high(arena.take<int64_t>(capacity)) {}
};

void query_strip(const Backward& all, const QueryTile& tile, int64_t row, int64_t block, int64_t count, bool finite) {
    int64_t low[kStripRows], high[kStripRows], lowest = count, highest = 0;
    for (int i = 0; i < kStripRows; ++i) {
        low[i] = smaller(larger<int64_t>(tile.low[row + i] - block, 0), count);
        high[i] = larger(low[i], smaller(tile.high[row + i] - block, count));
        if (low[i] == high[i]) continue;
        lowest = smaller(lowest, low[i]);
        highest = larger(highest, high[i]);
    }
    if (lowest >= highest) return;
    const int64_t begin = lowest / kPanel * kPanel, end = round_up(highest, kPanel);
    const int64_t dim = all.shape.dim, value_dim = all.shape.value_dim;
    for (int64_t j = begin; j < end; j += kPanel) {
        multiply<1, kStripRows, false>(tile.q + row * dim, tile.keys + j * dim, dim, tile.scores + j, kBlockKeys,
                                       nullptr);
        multiply<1, kStripRows, false>(tile.grad_out + row * value_dim, tile.values + j * value_dim, value_dim,
                                       tile.grads + j, kBlockKeys, nullptr);
    }
    for (int i = 0; i < kStripRows; ++i) {
        float *scores = tile.scores + i * kBlockKeys, *grads = tile.grads + i * kBlockKeys;
        const F32 normaliser = broadcast(tile.normaliser[row + i]), mean = broadcast(tile.mean[row + i]);
        for (int64_t j = begin; j < end; j += kWidth) {
            F32 weight, grad;
            all.differentiate(load(scores + j), load(grads + j), normaliser, mean, &weight, &grad);
            store(grads + j, grad);
        }
        for (int64_t j = begin; j < low[i]; ++j) grads[j] = 0.0f;
        for (int64_t j = high[i]; j < end; ++j) grads[j] = 0.0f;
    }
    add_product(tile.grads, lowest, highest, tile.key_rows, finite, all.dim_step, tile.sum + row * all.dim_step,
                [&](int64_t i, int64_t term) { return low[i] <= term && term < high[i]; });
}

void query_tile(const Backward& all, int64_t b, int64_t group, int64_t first_row, int64_t rows, char* scratch) {
    const dsa_dense_attention_args& args = all.args.forward;
    Arena arena{scratch};
    const QueryTile tile(all, rows, arena);
    pack_query_strips(args.q, b, group, all.shape.shared, first_row, rows, all.factor, tile.q);
    pack_query_strips(all.args.grad_out, b, group, all.shape.shared, first_row, rows, 1.0f, tile.grad_out);
    for (int64_t row = 0; row < tile.capacity; ++row) {
        tile.low[row] = tile.high[row] = 0;
        tile.normaliser[row] = tile.mean[row] = 0.0f;
    }
    all.read_rows(b, group, first_row, rows, tile.low, tile.high, tile.normaliser, tile.mean);
    int64_t first = all.shape.keys, last = 0;
    for (int64_t row = 0; row < rows; ++row) {
        if (tile.low[row] == tile.high[row]) continue;
        first = smaller(first, tile.low[row]);
        last = larger(last, tile.high[row]);
    }
    memset(tile.sum, 0, static_cast<size_t>(tile.capacity * all.dim_step) * 4);
    for (int64_t block = first; block < last; block += kBlockKeys) {
        const int64_t count = smaller(kBlockKeys, last - block);
        bool finite = true;
        with_type(args.k.dtype, [&](auto* type) {
            const auto keys = token_rows<std::remove_pointer_t<decltype(type)>>(args.k, b, block, group);
            pack_transposed<kPanel>(keys, count, all.shape.dim, 1.0f, tile.keys);
            finite = pack_rows(keys, count, all.shape.dim, kBlockRows, tile.key_rows);
        });
        with_type(args.v.dtype, [&](auto* type) {
            const auto values = token_rows<std::remove_pointer_t<decltype(type)>>(args.v, b, block, group);
            pack_transposed<kPanel>(values, count, all.shape.value_dim, 1.0f, tile.values);
        });
        for (int64_t row = 0; row < tile.capacity; row += kStripRows)
            query_strip(all, tile, row, block, count, finite);
    }
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t t = (first_row + row) / all.shape.shared;
        const int64_t head = group * all.shape.shared + (first_row + row) % all.shape.shared;
        write_row(all.args.grad_q, b, t, head, tile.sum + row * all.dim_step, broadcast(args.scale));
    }
}

// Gradients of a tile of keys and values; its rows are keys, its columns query rows.
struct KeyTile {
    int64_t capacity;
    float *keys, *values, *key_sum, *value_sum, *rows, *q, *grad_out, *q_rows, *grad_rows, *scores, *grads;
    float *normaliser, *mean, *low_key, *high_key;
    int64_t *low, *high;

    KeyTile(const Backward& all, int64_t rows_wanted, Arena& arena)
        : capacity(round_up(rows_wanted, kStripRows)), keys(arena.take<float>(capacity * all.shape.dim)),
          values(arena.take<float>(capacity * all.shape.value_dim)), key_sum(arena.take<float>(capacity * all.dim_step)),
          value_sum(arena.take<float>(capacity * all.value_step)),
          rows(arena.take<float>(kBlockRows * larger(all.shape.dim, all.shape.value_dim))),
          q(arena.take<float>(kBlockRows * all.shape.dim)), grad_out(arena.take<float>(kBlockRows * all.shape.value_dim)),
          q_rows(arena.take<float>(kBlockRows * all.dim_step)), grad_rows(arena.take<float>(kBlockRows * all.value_step)),
          scores(arena.take<float>(kStripRows * kBlockRows)), grads(arena.take<float>(kStripRows * kBlockRows)),
          normaliser(arena.take<float>(kBlockRows)), mean(arena.take<float>(kBlockRows)),
          low_key(arena.take<float>(kBlockRows)), high_key(arena.take<float>(kBlockRows)),
          low(arena.take<int64_t>(kBlockRows)), high(arena.take<int64_t>(kBlockRows)) {}
};

// Query rows as right operands of both kinds. Returns whether they are finite.
bool pack_query_panels(const KeyTile& tile, const dsa_tensor& tensor, int64_t b, int64_t group, int64_t shared,
                       int64_t first, int64_t count, float factor, float* transposed, float* rows) {
    const int64_t dim = tensor.size[3];
    with_type(tensor.dtype, [&](auto* type) {
        for (int64_t i = 0; i < count; ++i) {
            const auto* from = place<std::remove_pointer_t<decltype(type)>>(tensor, b, (first + i) / shared,
                                                                            group * shared + (first + i) % shared);
            for (int64_t c = 0; c < dim; ++c) tile.rows[i * dim + c] = widen(from[c * tensor.stride[3]]);
        }
    });
    const Rows<float> packed{tile.rows, dim, 1};
    pack_transposed<kPanel>(packed, count, dim, factor, transposed);
    return pack_rows(packed, count, dim, kBlockRows, rows);
}

// One strip of keys, the rows [row, row + kStripRows) of the tile, against a block of `count` query rows.
void key_strip(const Backward& all, const KeyTile& tile, int64_t row, int64_t count, bool q_finite, bool grad_finite) {
    int64_t lowest = count, highest = 0;
    for (int64_t j = 0; j < count; ++j) {
        if (tile.high[j] <= row || tile.low[j] >= row + kStripRows) continue;
        lowest = smaller(lowest, j);
        highest = j + 1;
    }
    if (lowest >= highest) return;
    const int64_t begin = lowest / kPanel * kPanel, end = round_up(highest, kPanel);
    const int64_t dim = all.shape.dim, value_dim = all.shape.value_dim;
    for (int64_t j = begin; j < end; j += kPanel) {
        multiply<1, kStripRows, false>(tile.keys + row * dim, tile.q + j * dim, dim, tile.scores + j, kBlockKeys,
                                       nullptr);
        multiply<1, kStripRows, false>(tile.values + row * value_dim, tile.grad_out + j * value_dim, value_dim,
                                       tile.grads + j, kBlockKeys, nullptr);
    }
    for (int i = 0; i < kStripRows; ++i) {
        float *scores = tile.scores + i * kBlockKeys, *grads = tile.grads + i * kBlockKeys;
        const F32 key = broadcast(static_cast<float>(row + i));
        for (int64_t j = begin; j < end; j += kWidth) {
            F32 weight, grad;
            all.differentiate(load(scores + j), load(grads + j), load(tile.normaliser + j), load(tile.mean + j),
                              &weight, &grad);
            const F32 low = load(tile.low_key + j), high = load(tile.high_key + j);
            weight = select_below(key, low, zero(), select_below(key, high, weight, zero()));
            grad = select_below(key, low, zero(), select_below(key, high, grad, zero()));
            store(scores + j, weight);
            store(grads + j, grad);
        }
    }
    const auto seen = [&](int64_t i, int64_t j) { return tile.low[j] <= row + i && row + i < tile.high[j]; };
    add_product(tile.scores, lowest, highest, tile.grad_rows, grad_finite, all.value_step,
                tile.value_sum + row * all.value_step, seen);
    add_product(tile.grads, lowest, highest, tile.q_rows, q_finite, all.dim_step, tile.key_sum + row * all.dim_step,
                seen);
}

void key_tile(const Backward& all, int64_t b, int64_t group, int64_t first_key, int64_t count, char* scratch) {
    const dsa_dense_attention_args& args = all.args.forward;
    const int64_t shared = all.shape.shared;
    Arena arena{scratch};
    const KeyTile tile(all, count, arena);
    with_type(args.k.dtype, [&](auto* type) {
        pack_transposed<kStripRows>(token_rows<std::remove_pointer_t<decltype(type)>>(args.k, b, first_key, group),
                                    count, all.shape.dim, 1.0f, tile.keys);
    });
    with_type(args.v.dtype, [&](auto* type) {
        pack_transposed<kStripRows>(token_rows<std::remove_pointer_t<decltype(type)>>(args.v, b, first_key, group),
                                    count, all.shape.value_dim, 1.0f, tile.values);
    });
    memset(tile.key_sum, 0, static_cast<size_t>(tile.capacity * all.dim_step) * 4);
    memset(tile.value_sum, 0, static_cast<size_t>(tile.capacity * all.value_step) * 4);
    for (int64_t first = 0; first < all.query_rows; first += kBlockRows) {
        const int64_t rows = smaller(kBlockRows, all.query_rows - first);
        all.read_rows(b, group, first, rows, tile.low, tile.high, tile.normaliser, tile.mean);
        bool sees = false;
        for (int64_t j = 0; j < kBlockRows; ++j) {
            if (j >= rows) tile.low[j] = tile.high[j] = tile.normaliser[j] = tile.mean[j] = 0;
            tile.low[j] = smaller(larger<int64_t>(tile.low[j] - first_key, 0), count);
            tile.high[j] = smaller(larger<int64_t>(tile.high[j] - first_key, 0), count);
            tile.low_key[j] = static_cast<float>(tile.low[j]);
            tile.high_key[j] = static_cast<float>(tile.high[j]);
            sees |= tile.low[j] < tile.high[j];
        }
        if (!sees) continue;
        const bool q_finite =
            pack_query_panels(tile, args.q, b, group, shared, first, rows, all.factor, tile.q, tile.q_rows);
        const bool grad_finite = pack_query_panels(tile, all.args.grad_out, b, group, shared, first, rows, 1.0f,
                                                   tile.grad_out, tile.grad_rows);
        for (int64_t row = 0; row < tile.capacity; row += kStripRows)
            key_strip(all, tile, row, rows, q_finite, grad_finite);
    }
    for (int64_t row = 0; row < count; ++row) {
        if (all.args.grad_k.data)
            write_row(all.args.grad_k, b, first_key + row, group, tile.key_sum + row * all.dim_step,
                      broadcast(args.scale));
        if (all.args.grad_v.data)
            write_row(all.args.grad_v, b, first_key + row, group, tile.value_sum + row * all.value_step,
                      broadcast(1.0f));
    }
}

}  // namespace

int dense_attention_backward(const dsa_dense_attention_backward_args& args) {
    const Backward all(args);
    const Shape& shape = all.shape;
    const int threads = all.threads();
    const int64_t queries = all.tile_rows(all.query_rows), keys = all.tile_rows(shape.keys);
    Arena for_queries{nullptr}, for_keys{nullptr};
    QueryTile(all, queries, for_queries);
    KeyTile(all, keys, for_keys);
    const int64_t bytes = larger(for_queries.used, for_keys.used), sequences = shape.batch * shape.groups;
    const Scratch scratch(bytes * threads);
    if (scratch.failed()) return DSA_OUT_OF_MEMORY;

    for_each_item(shape.batch * shape.tokens, threads,
                  [&](int64_t item, int) { write_means(all, item / shape.tokens, item % shape.tokens); });
    const int64_t query_tiles = args.grad_q.data ? ceil_div(all.query_rows, queries) : 0;
    for_each_item(query_tiles * sequences, threads, [&](int64_t item, int worker) {
        const int64_t first = (query_tiles - 1 - item / sequences) * queries, which = item % sequences;
        query_tile(all, which / shape.groups, which % shape.groups, first, smaller(queries, all.query_rows - first),
                   scratch.at<char>(worker * bytes));
    });
    const int64_t key_tiles = args.grad_k.data || args.grad_v.data ? ceil_div(shape.keys, keys) : 0;
    for_each_item(key_tiles * sequences, threads, [&](int64_t item, int worker) {
        const int64_t first = item / sequences * keys, which = item % sequences;
        key_tile(all, which / shape.groups, which % shape.groups, first, smaller(keys, shape.keys - first),
                 scratch.at<char>(worker * bytes));
    });
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
