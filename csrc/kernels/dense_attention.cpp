// Dense attention, forward. Interface: dsa/dense_attention.h; how it works: src/dsa/ops/dense_attention/README.md.
#include "kernels/dense_attention_decode.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int64_t kTileBytes = 256 << 10;  // of queries and sums: keys and values still fit a core's cache
constexpr int64_t kSmallestTile = 56;      // rows; fewer do not pay for packing the keys
constexpr int64_t kItemsWanted = 32;       // so that many threads find work; the split never depends on their number
constexpr int64_t kSmallestChunk = 256;    // keys
constexpr int64_t kSmallWork = 400000;     // multiply-adds that are not worth another thread

// How the work is cut: tiles of query tokens, and for few queries chunks of keys whose results are merged.
struct Plan {
    bool streams;  // one query a sequence, see dense_attention_decode.h
    int64_t tile_tokens, tiles, chunks, chunk_keys, block_keys;
    int threads;

    explicit Plan(const Shape& s) {
        const auto aligned = [](const dsa_tensor& x) { return x.stride[3] == 1 && x.size[3] % kWidth == 0; };
        streams = s.tokens == 1 && s.shared < 16 && aligned(s.args->k) && aligned(s.args->v);
        block_keys = s.dim + s.value_dim > 512 ? 64 : kBlockKeys;
        const int64_t per_group = streams ? 1 : s.groups;
        int64_t rows = larger<int64_t>(1, kTileBytes / (4 * (s.dim + s.value_dim)));
        rows = smaller(rows, larger(kSmallestTile, s.batch * s.heads * s.tokens / kItemsWanted));
        tile_tokens = streams ? 1 : larger<int64_t>(1, rows / s.shared);
        tiles = ceil_div(s.tokens, tile_tokens);
        const int64_t items = larger<int64_t>(1, s.batch * per_group * tiles);
        chunks = items >= kItemsWanted ? 1 : larger<int64_t>(1, smaller(2 * kItemsWanted / items, s.keys / kSmallestChunk));
        chunk_keys = round_up(larger<int64_t>(1, ceil_div(s.keys, chunks)), kBlockKeys);
        chunks = larger<int64_t>(1, ceil_div(s.keys, chunk_keys));
        const int64_t work = s.batch * s.tokens * s.heads * s.keys * (s.dim + s.value_dim);
        threads = static_cast<int>(larger<int64_t>(1, smaller<int64_t>(s.args->threads, 1 + work / kSmallWork)));
    }
};

// Writes one row of the result from what all its keys left.
void finish_row(const Shape& shape, int64_t b, int64_t t, int64_t head, float top, float total, const float* sum) {
    const dsa_dense_attention_args& args = *shape.args;
    // Where something is seen the sum is at least 1. Where nothing is, the sink's exponential would stand alone: it may be
    // subnormal, and the reciprocal of that is infinite.
    const bool seen = total != 0.0f;
    *place<float>(args.lse, b, t, head) = seen ? (top + log2f(total)) * kLn2 : -INFINITY;
    if (seen && args.sink_logits.data) {
        const float sink = static_cast<const float*>(args.sink_logits.data)[head * args.sink_logits.stride[0]];
        total += exp2f(sink * kLog2E - top);
    }
    write_row(args.out, b, t, head, sum, broadcast(seen ? 1.0f / total : 0.0f));
}

// A tile's buffers within one worker's scratch memory.
struct Tile {
    int64_t capacity, sum_step, block_keys;  // rows, and distance between rows of sums
    float *q, *sum, *top, *total, *keys, *values, *scores;
    int64_t *first, *last;

    Tile(const Shape& s, const Plan& plan, Arena& arena)
        : capacity(round_up(plan.tile_tokens * s.shared, kStripRows)), sum_step(round_up(s.value_dim, kPanel)),
          block_keys(plan.block_keys), q(arena.take<float>(capacity * s.dim)),
          sum(arena.take<float>(capacity * sum_step)), top(arena.take<float>(capacity)),
          total(arena.take<float>(capacity)), keys(arena.take<float>(block_keys * s.dim)),
          values(arena.take<float>(block_keys * sum_step)), scores(arena.take<float>(kStripRows * kBlockKeys)),
          first(arena.take<int64_t>(capacity)), last(arena.take<int64_t>(capacity)) {}
};

// A row whose tile holds values that are not finite, of keys that the row may not see: one term after the other.
void add_visible_values(const Tile& tile, const float* weights, int64_t low, int64_t high, float factor, float* sum) {
    for (int64_t c = 0; c < tile.sum_step; c += kWidth) {
        const float* column = tile.values + c / kPanel * tile.block_keys * kPanel + c % kPanel;
        F32 total = load(sum + c) * broadcast(factor);
        for (int64_t j = low; j < high; ++j) total = fma(broadcast(weights[j]), load(column + j * kPanel), total);
        store(sum + c, total);
    }
}

// One strip of queries against one packed block of keys, [block, block + count).
void attend_strip(const Shape& shape, const Tile& tile, int64_t row, int64_t block, int64_t count, bool finite,
                  float softcap) {
    int64_t low[kStripRows], high[kStripRows], lowest = count, highest = 0;
    for (int i = 0; i < kStripRows; ++i) {
        low[i] = smaller(larger<int64_t>(tile.first[row + i] - block, 0), count);
        high[i] = larger(low[i], smaller(tile.last[row + i] - block, count));
        if (low[i] == high[i]) continue;
        lowest = smaller(lowest, low[i]);
        highest = larger(highest, high[i]);
    }
    if (lowest >= highest) return;
    const int64_t begin = lowest / kPanel * kPanel, end = round_up(highest, kPanel);
    const float* q = tile.q + row * shape.dim;
    for (int64_t j = begin; j < end; j += kPanel)
        multiply<1, kStripRows, false>(q, tile.keys + j * shape.dim, shape.dim, tile.scores + j, kBlockKeys, nullptr);
    float shrink[kStripRows];
    bool all_seen = true;
    for (int i = 0; i < kStripRows; ++i) {
        float* scores = tile.scores + i * kBlockKeys;
        shrink[i] = 1.0f;
        all_seen &= low[i] == lowest && high[i] == highest;
        if (low[i] == high[i]) {
            memset(scores + begin, 0, static_cast<size_t>(end - begin) * 4);
            continue;
        }
        if (softcap != 0.0f) cap_scores(scores + begin, end - begin, softcap);
        for (int64_t j = begin; j < low[i]; ++j) scores[j] = -INFINITY;
        for (int64_t j = high[i]; j < end; ++j) scores[j] = -INFINITY;
        shrink[i] = weigh(scores + begin, end - begin, tile.top + row + i, tile.total + row + i);
    }
    float* sum = tile.sum + row * tile.sum_step;
    if (finite || all_seen) {
        for (int64_t c = 0; c < tile.sum_step; c += kPanel)
            multiply<kBlockKeys, 1, true>(tile.scores + lowest, tile.values + c * tile.block_keys + lowest * kPanel,
                                          highest - lowest, sum + c, tile.sum_step, shrink);
    } else {
        for (int i = 0; i < kStripRows; ++i)
            add_visible_values(tile, tile.scores + i * kBlockKeys, low[i], high[i], shrink[i], sum + i * tile.sum_step);
    }
}

// The queries [t0, t1) of one KV head over the keys [from, to); what is left stays in the tile.
void attend_tile(const Shape& shape, const Tile& tile, int64_t b, int64_t group, int64_t t0, int64_t t1, int64_t from,
                 int64_t to) {
    const dsa_dense_attention_args& args = *shape.args;
    const int64_t rows = (t1 - t0) * shape.shared, padded = round_up(rows, kStripRows);
    int64_t first = to, last = from;
    for (int64_t row = 0; row < padded; ++row) {
        tile.first[row] = tile.last[row] = 0;
        tile.top[row] = -INFINITY;
        tile.total[row] = 0.0f;
        if (row >= rows) continue;
        shape.visible(b, t0 + row / shape.shared, tile.first + row, tile.last + row);
        if (tile.first[row] == tile.last[row]) continue;
        first = smaller(first, tile.first[row]);
        last = larger(last, tile.last[row]);
    }
    first = larger(first, from);
    last = smaller(last, to);
    memset(tile.sum, 0, static_cast<size_t>(padded * tile.sum_step) * 4);
    if (first >= last) return;
    const float factor = score_factor(args);
    pack_query_strips(args.q, b, group, shape.shared, t0 * shape.shared, rows, factor, tile.q);
    for (int64_t block = first; block < last; block += tile.block_keys) {
        const int64_t count = smaller(tile.block_keys, last - block);
        bool finite = true;
        with_type(args.k.dtype, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            pack_transposed<kPanel>(token_rows<T>(args.k, b, block, group), count, shape.dim, 1.0f, tile.keys);
        });
        with_type(args.v.dtype, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            finite = pack_rows(token_rows<T>(args.v, b, block, group), count, shape.value_dim, tile.block_keys,
                               tile.values);
        });
        for (int64_t row = 0; row < padded; row += kStripRows)
            attend_strip(shape, tile, row, block, count, finite, args.softcap);
    }
}

// Where chunks of keys leave their sums: [chunk][b, t, head], merged at the end.
struct Partials {
    int64_t rows, sum_step;
    Scratch memory;

    Partials(const Shape& s, const Plan& plan)
        : rows(plan.chunks > 1 ? s.batch * s.tokens * s.heads : 0), sum_step(round_up(s.value_dim, kWidth)),
          memory(plan.chunks * rows * (sum_step + 2) * 4) {}

    Partial at(int64_t chunk, int64_t row) const {
        float* base = memory.at<float>() + chunk * rows * (sum_step + 2);
        return {base + row, base + rows + row, base + 2 * rows + row * sum_step, sum_step};
    }

    void merge_row(const Shape& shape, int64_t chunks, int64_t row, float* sum) const {
        float top = -INFINITY, total = 0.0f;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) top = larger(top, *at(chunk, row).top);
        const float base = top == -INFINITY ? 0.0f : top;
        for (int64_t c = 0; c < sum_step; c += kWidth) store(sum + c, zero());
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const Partial part = at(chunk, row);
            const float factor = exp2f(*part.top - base);
            total += *part.total * factor;
            for (int64_t c = 0; c < sum_step; c += kWidth)
                store(sum + c, fma(broadcast(factor), load(part.sum + c), load(sum + c)));
        }
        const int64_t head = row % shape.heads, token = row / shape.heads;
        finish_row(shape, token / shape.tokens, token % shape.tokens, head, top, total, sum);
    }
};

// One query of every head over a chunk of keys.
void stream_item(const Shape& shape, const Plan& plan, int64_t b, int64_t chunk, char* scratch,
                 const Partials& partials) {
    const dsa_dense_attention_args& args = *shape.args;
    const int64_t sum_step = partials.sum_step, heads = shape.heads;
    float* q = reinterpret_cast<float*>(scratch);
    float* scores = q + heads * shape.dim;
    float* own = scores + heads * kStreamKeys;
    Partial part{own, own + heads, own + 2 * heads, sum_step};
    if (plan.chunks > 1) part = partials.at(chunk, b * heads);
    for (int64_t head = 0; head < heads; ++head) {
        part.top[head] = -INFINITY;
        part.total[head] = 0.0f;
        memset(part.sum + head * sum_step, 0, static_cast<size_t>(sum_step) * 4);
    }
    int64_t first, last;
    shape.visible(b, 0, &first, &last);
    first = larger(first, chunk * plan.chunk_keys);
    last = smaller(last, (chunk + 1) * plan.chunk_keys);
    if (first < last) {
        const float factor = score_factor(args);
        with_type(args.q.dtype, [&](auto* type) {
            for (int64_t head = 0; head < heads; ++head) {
                const auto* from = place<std::remove_pointer_t<decltype(type)>>(args.q, b, 0, head);
                for (int64_t c = 0; c < shape.dim; ++c)
                    q[head * shape.dim + c] = widen(from[c * args.q.stride[3]]) * factor;
            }
        });
        with_type(args.k.dtype, [&](auto* key) {
            with_type(args.v.dtype, [&](auto* value) {
                stream_keys<std::remove_pointer_t<decltype(key)>, std::remove_pointer_t<decltype(value)>>(
                    shape, b, first, last, q, scores, args.softcap, part);
            });
        });
    }
    if (plan.chunks > 1) return;
    for (int64_t head = 0; head < heads; ++head)
        finish_row(shape, b, 0, head, part.top[head], part.total[head], part.sum + head * sum_step);
}

void tile_item(const Shape& shape, const Plan& plan, int64_t b, int64_t group, int64_t tile_index, int64_t chunk,
               char* scratch, const Partials& partials) {
    Arena arena{scratch};
    const Tile tile(shape, plan, arena);
    const int64_t t0 = tile_index * plan.tile_tokens, t1 = smaller(t0 + plan.tile_tokens, shape.tokens);
    attend_tile(shape, tile, b, group, t0, t1, chunk * plan.chunk_keys,
                smaller((chunk + 1) * plan.chunk_keys, shape.keys));
    for (int64_t row = 0; row < (t1 - t0) * shape.shared; ++row) {
        const int64_t t = t0 + row / shape.shared, head = group * shape.shared + row % shape.shared;
        const float* sum = tile.sum + row * tile.sum_step;
        if (plan.chunks == 1) {
            finish_row(shape, b, t, head, tile.top[row], tile.total[row], sum);
            continue;
        }
        const Partial part = partials.at(chunk, (b * shape.tokens + t) * shape.heads + head);
        *part.top = tile.top[row];
        *part.total = tile.total[row];
        memcpy(part.sum, sum, static_cast<size_t>(part.sum_step) * 4);
    }
}

}  // namespace

int dense_attention(const dsa_dense_attention_args& args) {
    const Shape shape(args);
    const Plan plan(shape);
    if (shape.batch * shape.tokens == 0) return DSA_OK;
    const Partials partials(shape, plan);
    Arena needed{nullptr};
    Tile(shape, plan, needed);
    int64_t bytes = needed.used;
    if (plan.streams) bytes = shape.heads * (shape.dim + kStreamKeys + partials.sum_step + 2) * 4;
    bytes = round_up(larger(bytes, partials.sum_step * 4), 64);
    const Scratch scratch(bytes * plan.threads);
    if (scratch.failed() || partials.memory.failed()) return DSA_OUT_OF_MEMORY;

    const int64_t per_tile = plan.streams ? shape.batch : shape.batch * shape.groups;
    for_each_item(plan.tiles * per_tile * plan.chunks, plan.threads, [&](int64_t item, int worker) {
        char* memory = scratch.at<char>(worker * bytes);
        const int64_t chunk = item % plan.chunks, which = item / plan.chunks % per_tile;
        if (plan.streams) return stream_item(shape, plan, which, chunk, memory, partials);
        // The last queries see the most: they begin, so that no thread is left with a long one at the end.
        const int64_t tile_index = plan.tiles - 1 - item / plan.chunks / per_tile;
        tile_item(shape, plan, which / shape.groups, which % shape.groups, tile_index, chunk, memory, partials);
    });
    if (plan.chunks > 1) {
        for_each_item(partials.rows, plan.chunks * partials.rows > 2048 ? plan.threads : 1,
                      [&](int64_t row, int worker) {
                          partials.merge_row(shape, plan.chunks, row, scratch.at<float>(worker * bytes));
                      });
    }
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
