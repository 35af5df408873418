// Eq. 3: both distributions over all visible tokens. How it works: src/dsa/ops/indexer_loss/README.md.
//
// A vector's lanes are neighbouring queries, a block. Keys come in chunks on a fixed grid, each worked on by one
// thread, so that no sum depends on how many threads there are.
#include "kernels/indexer_loss_tiles.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int64_t kChunk = 256;
constexpr int kMostBlocks = 64;
// Blocks go together while what they keep between the passes fits a cache ...
constexpr int64_t kTogetherBytes = 8 << 20;
// ... and a block keeps nothing, but computes it again, where it alone would take more than this.
constexpr int64_t kKeptBytes = int64_t(512) << 20;

constexpr int64_t kNever = INT64_MAX;

struct Block {
    int64_t first;
    Range lanes[kWidth];
    Range any;                      // the union of what the lanes see, and of what they keep
    int64_t all_begin, all_end;     // what every lane keeps
    int64_t first_chunk, chunks;
    float *main, *index, *weighted, *coefficient;  // packed queries
    float *weights, *dots;                         // [keys][H][lanes], [keys][Hi][lanes]; kept between the passes
    float* stats;
    float log_sum[kWidth];
    bool counted[kWidth];
    double loss;
};

struct Tile {
    const float* rows;
    int64_t stride;
};

class Visible {
  public:
    Visible(const dsa_indexer_loss_args& args, int threads)
        : args_(args),
          threads_(threads),
          tokens_(args.q.size[1]),
          keys_(args.k.size[1]),
          heads_(args.q.size[2]),
          groups_(args.k.size[2]),
          dim_(args.q.size[3]),
          shared_(heads_ / groups_),
          index_heads_(args.q_index.size[2]),
          index_dim_(args.q_index.size[3]),
          padded_(round_up(index_dim_, kWidth)),
          wanted_(args.grad_q.data != nullptr),
          stat_size_((3 * heads_ + 3 + (wanted_ ? index_heads_ * (1 + index_dim_) : 0)) * kWidth) {}

    int run(double* loss, int64_t* count);

  private:
    const dsa_indexer_loss_args& args_;
    const int threads_;
    const int64_t tokens_, keys_, heads_, groups_, dim_, shared_, index_heads_, index_dim_, padded_;
    const bool wanted_;
    const int64_t stat_size_;
    bool keep_ = true;
    int64_t batch_ = 0;
    float* grad_k_ = nullptr;  // [S, padded]
    Block blocks_[kMostBlocks];
    int count_ = 0;

    Block plan(int64_t first) const;
    int64_t pack_floats() const {
        return (heads_ * dim_ + index_heads_ * (index_dim_ + padded_ + 1)) * kWidth;
    }
    int64_t block_bytes(const Block& block) const {
        const int64_t kept = keep_ ? block.chunks * kChunk * (heads_ + index_heads_) * kWidth : 0;
        return 4 * (pack_floats() + block.chunks * stat_size_ + kept);
    }
    int64_t worker_floats() const {
        return kChunk * (dim_ + padded_ + 2 * kWidth + (keep_ ? 0 : (heads_ + index_heads_) * kWidth)) + stat_size_;
    }
    void place(Block& block, float* memory) const;
    void pack(Block& block, float* row) const;
    Tile main_tile(int64_t group, int64_t begin, int64_t end, float* buffer) const;
    void index_tile(int64_t begin, float* buffer) const;
    void attend(const Block& block, int64_t chunk, int64_t group, Tile tile, float* weights, float* stats) const;
    template <bool kEdges>
    void normalise(const Block& block, int64_t chunk, int64_t low, int64_t high, float* weights, float* stats) const;
    void score(const Block& block, int64_t chunk, const float* tile, float* dots, float* scores, float* stats) const;
    void merge(Block& block) const;
    template <bool kEdges>
    void diverge(Block& block, int64_t chunk, const float* weights, const float* dots, float* grads,
                 float* stats) const;
    void differentiate(Block& block, int64_t chunk, const float* tile, const float* grads, float* dots,
                       float* stats) const;
    void finish(Block& block) const;
    void run_together(Scratch& workers);

    float* stats_of(const Block& block, int64_t chunk) const {
        return block.stats + (chunk - block.first_chunk) * stat_size_;
    }
    float* index_stats(float* stats) const { return stats + 3 * heads_ * kWidth; }
    bool every_lane_keeps(const Block& block, int64_t begin, int64_t end) const {
        return begin >= block.all_begin && end <= block.all_end;
    }
};

// A range relative to a chunk's first key, lane by lane.
struct Edges {
    F32 begin, end, kept_begin, kept_end;
    Edges(const Block& block, int64_t origin) {
        float values[4][kWidth];
        for (int lane = 0; lane < kWidth; ++lane) {
            const Range& range = block.lanes[lane];
            const int64_t limits[4] = {range.begin, range.end, range.kept_begin, range.kept_end};
            for (int i = 0; i < 4; ++i)
                values[i][lane] = static_cast<float>(larger<int64_t>(0, smaller(limits[i] - origin, kChunk)));
        }
        begin = load(values[0]);
        end = load(values[1]);
        kept_begin = load(values[2]);
        kept_end = load(values[3]);
    }
    F32 seen(F32 at, F32 x, F32 other) const {
        return select_below(at, begin, other, select_below(at, end, x, other));
    }
    F32 kept(F32 at, F32 x, F32 other) const {
        return select_below(at, kept_begin, other, select_below(at, kept_end, x, other));
    }
};

Block Visible::plan(int64_t first) const {
    Block block;
    block.first = first;
    block.any = {kNever, 0, kNever, 0};
    block.all_begin = 0;
    block.all_end = kNever;
    block.loss = 0;
    for (int lane = 0; lane < kWidth; ++lane) {
        Range& range = block.lanes[lane];
        range = {0, 0, 0, 0};
        if (first + lane < tokens_) range = range_of(args_, batch_, first + lane);
        block.counted[lane] = range.kept_end > range.kept_begin;
        block.all_begin = larger(block.all_begin, range.kept_begin);
        block.all_end = smaller(block.all_end, range.kept_end);
        if (!block.counted[lane]) continue;
        block.any.begin = smaller(block.any.begin, range.begin);
        block.any.end = larger(block.any.end, range.end);
        block.any.kept_begin = smaller(block.any.kept_begin, range.kept_begin);
        block.any.kept_end = larger(block.any.kept_end, range.kept_end);
    }
    if (block.any.end == 0) block.any = {0, 0, 0, 0};
    block.first_chunk = block.any.begin / kChunk;
    block.chunks = ceil_div(block.any.end, kChunk) - block.first_chunk;
    return block;
}

void Visible::place(Block& block, float* memory) const {
    block.main = memory;
    block.index = block.main + heads_ * dim_ * kWidth;
    block.weighted = block.index + index_heads_ * index_dim_ * kWidth;
    block.coefficient = block.weighted + index_heads_ * padded_ * kWidth;
    block.stats = memory + pack_floats();
    block.weights = block.stats + block.chunks * stat_size_;
    block.dots = block.weights + block.chunks * kChunk * heads_ * kWidth;
}

// Queries side by side: main [G][D][shared][lanes], index [Di][Hi][lanes]; times their weights [Hi][lanes][padded].
void Visible::pack(Block& block, float* row) const {
    clear(block.main, pack_floats());
    for (int lane = 0; lane < kWidth; ++lane) {
        if (!block.counted[lane]) continue;
        const int64_t t = block.first + lane;
        const dsa_tensor &q = args_.q, &qi = args_.q_index, &w = args_.w_index;
        for (int64_t h = 0; h < heads_; ++h) {
            read_row(q, batch_ * q.stride[0] + t * q.stride[1] + h * q.stride[2], row);
            float* out = block.main + (h / shared_ * dim_ * shared_ + h % shared_) * kWidth + lane;
            for (int64_t d = 0; d < dim_; ++d) out[d * shared_ * kWidth] = row[d] * args_.attention_scale;
        }
        read_row(w, batch_ * w.stride[0] + t * w.stride[1], row);
        for (int64_t j = 0; j < index_heads_; ++j) block.coefficient[j * kWidth + lane] = row[j] * args_.index_scale;
        for (int64_t j = 0; j < index_heads_; ++j) {
            read_row(qi, batch_ * qi.stride[0] + t * qi.stride[1] + j * qi.stride[2], row);
            const float coefficient = block.coefficient[j * kWidth + lane];
            for (int64_t d = 0; d < index_dim_; ++d) {
                block.index[(d * index_heads_ + j) * kWidth + lane] = row[d];
                block.weighted[(j * kWidth + lane) * padded_ + d] = row[d] * coefficient;
            }
        }
    }
}

// The keys [begin, end) of one KV head: where they lie if they are plain fp32, else widened.
Tile Visible::main_tile(int64_t group, int64_t begin, int64_t end, float* buffer) const {
    const dsa_tensor& k = args_.k;
    const int64_t offset = batch_ * k.stride[0] + group * k.stride[2];
    if (k.dtype == DSA_F32 && k.stride[3] == 1)
        return {static_cast<const float*>(k.data) + offset + begin * k.stride[1], k.stride[1]};
    for (int64_t s = begin; s < end; ++s) read_row(k, offset + s * k.stride[1], buffer + (s - begin) * dim_);
    return {buffer, dim_};
}

// The index keys of the chunk that begins at `begin`, fp32 [kChunk][padded]; zeros where no query that counts keeps
// them: they may hold anything, and zero times NaN would reach the gradients.
void Visible::index_tile(int64_t begin, float* buffer) const {
    bool used[kChunk] = {};
    for (int at = 0; at < count_; ++at) {
        for (const Range& range : blocks_[at].lanes) {
            const int64_t low = larger(range.kept_begin, begin), high = smaller(range.kept_end, begin + kChunk);
            if (low < high) memset(used + (low - begin), 1, static_cast<size_t>(high - low));
        }
    }
    const dsa_tensor& k = args_.k_index;
    clear(buffer, kChunk * padded_);
    for (int64_t i = 0; i < kChunk; ++i)
        if (used[i]) read_row(k, batch_ * k.stride[0] + (begin + i) * k.stride[1], buffer + i * padded_);
}

// Exponentials of the heads of one group relative to the chunk's maximum, with that and their sums over what is seen
// and over what is kept.
void Visible::attend(const Block& block, int64_t chunk, int64_t group, Tile tile, float* weights, float* stats) const {
    const int64_t origin = chunk * kChunk;
    const int64_t low = larger(block.any.begin, origin), high = smaller(block.any.end, origin + kChunk);
    if (low >= high) return;
    const int64_t row = heads_ * kWidth, head = group * shared_;
    float* out = weights + (low - origin) * row + head * kWidth;
    product<false>(shared_, block.main + head * dim_ * kWidth, shared_ * kWidth, tile.rows + (low - origin) * tile.stride,
                   tile.stride, 1, high - low, dim_, out, row);
    for (int64_t h = head; h < head + shared_; ++h) {
        if (every_lane_keeps(block, low, high))
            normalise<false>(block, chunk, low - origin, high - origin, weights + h * kWidth, stats + h * kWidth);
        else
            normalise<true>(block, chunk, low - origin, high - origin, weights + h * kWidth, stats + h * kWidth);
    }
}

template <bool kEdges>
void Visible::normalise(const Block& block, int64_t chunk, int64_t low, int64_t high, float* weights,
                        float* stats) const {
    const int64_t row = heads_ * kWidth;
    const Edges edges(block, chunk * kChunk);
    F32 top = broadcast(kLowest), sum = zero(), kept = zero();
    const F32 lowest = top, softcap = broadcast(args_.softcap);
    for (int64_t s = low; s < high; ++s) {
        F32 logit = load(weights + s * row);
        if (args_.softcap != 0.0f) {
            logit = capped(logit, softcap);
            store(weights + s * row, logit);
        }
        if (kEdges) logit = edges.seen(broadcast(static_cast<float>(s)), logit, lowest);
        top = max(logit, top);
    }
    for (int64_t s = low; s < high; ++s) {
        F32 weight = exp(load(weights + s * row) - top);
        if (kEdges) {
            const F32 at = broadcast(static_cast<float>(s));
            weight = edges.seen(at, weight, zero());
            kept += edges.kept(at, weight, zero());
        }
        sum += weight;
        store(weights + s * row, weight);
    }
    store(stats, top);
    store(stats + row, sum);
    store(stats + 2 * row, kEdges ? kept : sum);
}

// The index heads' dot products after ReLU, and maximum and sum of the exponentials of the scores.
void Visible::score(const Block& block, int64_t chunk, const float* tile, float* dots, float* scores,
                    float* stats) const {
    const int64_t origin = chunk * kChunk, row = index_heads_ * kWidth;
    const int64_t low = larger(block.any.kept_begin, origin) - origin;
    const int64_t high = smaller(block.any.kept_end, origin + kChunk) - origin;
    F32 top = broadcast(kLowest), sum = zero();
    const F32 lowest = top;
    if (low < high) {
        product<false>(index_heads_, block.index, row, tile + low * padded_, padded_, 1, high - low, index_dim_,
                       dots + low * row, row);
        const Edges edges(block, origin);
        for (int64_t s = low; s < high; ++s) {
            F32 score = zero();
            for (int64_t j = 0; j < index_heads_; ++j) {
                float* dot = dots + s * row + j * kWidth;
                const F32 positive = max(zero(), load(dot));
                store(dot, positive);
                score = fma(load(block.coefficient + j * kWidth), positive, score);
            }
            score = edges.kept(broadcast(static_cast<float>(s)), score, lowest);
            store(scores + s * kWidth, score);
            top = max(score, top);
        }
        for (int64_t s = low; s < high; ++s)
            sum += edges.kept(broadcast(static_cast<float>(s)), exp(load(scores + s * kWidth) - top), zero());
    }
    store(index_stats(stats), top);
    store(index_stats(stats) + kWidth, sum);
}

// From the chunks' maxima and sums to the factors that make their exponentials probabilities of the target, which
// take the place of the maxima, and the logarithm of the index scores' sum.
void Visible::merge(Block& block) const {
    const int64_t row = heads_ * kWidth;
    F32 mass = zero();
    for (int64_t h = 0; h < heads_; ++h) {
        F32 top = broadcast(kLowest), sum = zero(), kept = zero();
        for (int64_t c = 0; c < block.chunks; ++c) top = max(load(block.stats + c * stat_size_ + h * kWidth), top);
        for (int64_t c = 0; c < block.chunks; ++c) {
            float* stats = block.stats + c * stat_size_ + h * kWidth;
            const F32 factor = exp(load(stats) - top);
            sum = fma(factor, load(stats + row), sum);
            kept = fma(factor, load(stats + 2 * row), kept);
        }
        F32 share = broadcast(1.0f);
        if (args_.sink_logits.data != nullptr) {
            const float sink = static_cast<const float*>(args_.sink_logits.data)[h * args_.sink_logits.stride[0]];
            const F32 beside = exp(broadcast(sink) - top);
            sum += beside;
            share = select_below(broadcast(1e38f), beside, zero(), share);
        }
        // Lanes without queries have sums of zero.
        share = share / select_below(zero(), sum, sum, sum + broadcast(1.0f));
        mass += kept * share;
        for (int64_t c = 0; c < block.chunks; ++c) {
            float* stats = block.stats + c * stat_size_ + h * kWidth;
            store(stats, exp(load(stats) - top) * share);
        }
    }
    float masses[kWidth];
    store(masses, mass);
    for (int lane = 0; lane < kWidth; ++lane) {
        // NaN is not below anything and reaches the loss.
        if (block.counted[lane] && !(masses[lane] < kLeastMass)) continue;
        block.counted[lane] = false;
        block.lanes[lane] = {0, 0, 0, 0};
        block.all_begin = kNever;
        masses[lane] = 1.0f;
    }
    mass = load(masses);
    F32 top = broadcast(kLowest), sum = zero();
    for (int64_t c = 0; c < block.chunks; ++c) {
        float* stats = block.stats + c * stat_size_;
        for (int64_t h = 0; h < heads_; ++h) store(stats + h * kWidth, load(stats + h * kWidth) / mass);
        top = max(load(index_stats(stats)), top);
    }
    for (int64_t c = 0; c < block.chunks; ++c) {
        float* stats = index_stats(block.stats + c * stat_size_);
        sum = fma(exp(load(stats) - top), load(stats + kWidth), sum);
    }
    // The difference of a sum from itself is zero, or NaN where it is not finite.
    store(block.log_sum, top + log(sum) + (sum - sum));
}

// The chunk's part of the divergence, and its derivative by the scores in `grads`.
template <bool kEdges>
void Visible::diverge(Block& block, int64_t chunk, const float* weights, const float* dots, float* grads,
                      float* stats) const {
    const int64_t origin = chunk * kChunk;
    const int64_t low = larger(block.any.kept_begin, origin) - origin;
    const int64_t high = smaller(block.any.kept_end, origin + kChunk) - origin;
    const Edges edges(block, origin);
    const F32 log_sum = load(block.log_sum);
    F32 loss = zero();
    for (int64_t s = low; s < high; ++s) {
        F32 target = zero(), score = zero();
        for (int64_t h = 0; h < heads_; ++h)
            target = fma(load(weights + (s * heads_ + h) * kWidth), load(stats + h * kWidth), target);
        for (int64_t j = 0; j < index_heads_; ++j)
            score = fma(load(block.coefficient + j * kWidth), load(dots + (s * index_heads_ + j) * kWidth), score);
        const F32 predicted = score - log_sum;
        F32 term = select_below(zero(), target, target * (log(target) - predicted), target);
        F32 grad = exp(predicted) - target;
        if (kEdges) {
            const F32 at = broadcast(static_cast<float>(s));
            term = edges.kept(at, term, zero());
            grad = edges.kept(at, grad, zero());
        }
        loss += term;
        store(grads + s * kWidth, grad);
    }
    store(index_stats(stats) + 2 * kWidth, loss);
}

// The chunk's part of the three gradients; `dots` become what passes the ReLU.
void Visible::differentiate(Block& block, int64_t chunk, const float* tile, const float* grads, float* dots,
                            float* stats) const {
    const int64_t origin = chunk * kChunk, row = index_heads_ * kWidth;
    const int64_t low = larger(block.any.kept_begin, origin) - origin;
    const int64_t high = smaller(block.any.kept_end, origin + kChunk) - origin;
    float* grad_w = index_stats(stats) + 3 * kWidth;
    for (int64_t j = 0; j < index_heads_; ++j) {
        F32 sum = zero();
        for (int64_t s = low; s < high; ++s) {
            float* at = dots + s * row + j * kWidth;
            const F32 dot = load(at), grad = load(grads + s * kWidth);
            sum = fma(grad, dot, sum);
            store(at, select_below(zero(), dot, grad, zero()));
        }
        store(grad_w + j * kWidth, sum);
    }
    const float* passed = dots + low * row;
    product<false>(index_heads_, passed, row, tile + low * padded_, 1, padded_, index_dim_, high - low, grad_w + row,
                   row);
    product<true>(padded_ / kWidth, block.weighted, padded_, passed, row, 1, high - low, row,
                  grad_k_ + (origin + low) * padded_, padded_);
}

// Adds up the chunks of a block in order.
void Visible::finish(Block& block) const {
    const int64_t row = index_heads_ * kWidth;
    const int64_t low = block.any.kept_begin / kChunk, high = ceil_div(block.any.kept_end, kChunk);
    for (int64_t chunk = low; chunk < high; ++chunk) {
        const float* stats = index_stats(stats_of(block, chunk));
        for (int lane = 0; lane < kWidth; ++lane)
            if (block.counted[lane]) block.loss += static_cast<double>(stats[2 * kWidth + lane]);
    }
    if (!wanted_) return;
    const int64_t lanes = smaller<int64_t>(kWidth, tokens_ - block.first);
    for (int64_t j = 0; j < index_heads_; ++j) {
        for (int64_t d = -1; d < index_dim_; ++d) {
            F32 sum = zero();
            for (int64_t chunk = low; chunk < high; ++chunk)
                sum += load(index_stats(stats_of(block, chunk)) + 3 * kWidth + (d + 1) * row + j * kWidth);
            const F32 factor = d < 0 ? broadcast(args_.index_scale) : load(block.coefficient + j * kWidth);
            float values[kWidth];
            store(values, sum * factor);
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const int64_t place = (batch_ * tokens_ + block.first + lane) * index_heads_ + j;
                const float value = block.counted[lane] ? values[lane] : 0.0f;
                if (d < 0)
                    static_cast<float*>(args_.grad_w.data)[place] = value;
                else
                    static_cast<float*>(args_.grad_q.data)[place * index_dim_ + d] = value;
            }
        }
    }
}

// Both passes over some blocks.
void Visible::run_together(Scratch& workers) {
    int64_t begin = kNever, end = 0;
    for (int at = 0; at < count_; ++at) {
        if (blocks_[at].chunks == 0) continue;
        begin = smaller(begin, blocks_[at].first_chunk);
        end = larger(end, blocks_[at].first_chunk + blocks_[at].chunks);
    }
    const int64_t bytes = round_up(4 * worker_floats(), 64);
    for_each_item(count_, threads_, [&](int64_t at, int worker) { pack(blocks_[at], workers.at<float>(worker * bytes)); });
    auto pass = [&](int64_t chunk, int worker, bool second) {
        float* main = workers.at<float>(worker * bytes);
        float* index = main + kChunk * dim_;
        float* scores = index + kChunk * padded_;
        float* spare_stats = scores + 2 * kChunk * kWidth;
        float* spare = spare_stats + stat_size_;
        const int64_t origin = chunk * kChunk, last = smaller(origin + kChunk, keys_);
        index_tile(origin, index);
        auto weights_of = [&](const Block& block) {
            return keep_ ? block.weights + (chunk - block.first_chunk) * kChunk * heads_ * kWidth : spare;
        };
        auto dots_of = [&](const Block& block) {
            return keep_ ? block.dots + (chunk - block.first_chunk) * kChunk * index_heads_ * kWidth
                         : spare + kChunk * heads_ * kWidth;
        };
        auto attend_all = [&](int from, int to) {
            for (int64_t group = 0; group < groups_; ++group) {
                const Tile tile = main_tile(group, origin, last, main);
                for (int at = from; at < to; ++at) {
                    const Block& block = blocks_[at];
                    if (chunk < block.first_chunk || chunk >= block.first_chunk + block.chunks) continue;
                    attend(block, chunk, group, tile, weights_of(block),
                           second ? spare_stats : stats_of(block, chunk));
                }
            }
        };
        if (!second) attend_all(0, count_);
        for (int at = 0; at < count_; ++at) {
            Block& block = blocks_[at];
            if (chunk < block.first_chunk || chunk >= block.first_chunk + block.chunks) continue;
            float *dots = dots_of(block), *stats = stats_of(block, chunk);
            if (!second || !keep_) score(block, chunk, index, dots, scores, second ? spare_stats : stats);
            if (!second) continue;
            const int64_t low = larger(block.any.kept_begin, origin), high = smaller(block.any.kept_end, last);
            if (low >= high) continue;
            if (!keep_) attend_all(at, at + 1);
            float* grads = scores + kChunk * kWidth;
            if (every_lane_keeps(block, low, high))
                diverge<false>(block, chunk, weights_of(block), dots, grads, stats);
            else
                diverge<true>(block, chunk, weights_of(block), dots, grads, stats);
            if (wanted_) differentiate(block, chunk, index, grads, dots, stats);
        }
    };
    const int64_t chunks = larger<int64_t>(0, end - begin);
    for_each_item(chunks, threads_, [&](int64_t item, int worker) { pass(begin + item, worker, false); });
    for_each_item(count_, threads_, [&](int64_t at, int) { merge(blocks_[at]); });
    for_each_item(chunks, threads_, [&](int64_t item, int worker) { pass(begin + item, worker, true); });
    for_each_item(count_, threads_, [&](int64_t at, int) { finish(blocks_[at]); });
}

int Visible::run(double* loss, int64_t* count) {
    int64_t largest = 0;
    for (bool again = true; again;) {
        again = false;
        largest = 0;
        for (batch_ = 0; batch_ < args_.q.size[0]; ++batch_)
            for (int64_t t = 0; t < tokens_; t += kWidth) largest = larger(largest, block_bytes(plan(t)));
        if (keep_ && largest > kKeptBytes) {
            keep_ = false;
            again = true;
        }
    }
    const int64_t capacity = larger(largest + 64, kTogetherBytes);
    Scratch memory(capacity), workers(round_up(4 * worker_floats(), 64) * larger(threads_, 1));
    const bool direct = padded_ == index_dim_;
    Scratch padded_keys(wanted_ && !direct ? 4 * keys_ * padded_ : 0);
    if (memory.failed() || workers.failed() || padded_keys.failed()) return DSA_OUT_OF_MEMORY;
    for (batch_ = 0; batch_ < args_.q.size[0]; ++batch_) {
        float* grad_k = wanted_ ? static_cast<float*>(args_.grad_k.data) + batch_ * keys_ * index_dim_ : nullptr;
        grad_k_ = direct ? grad_k : padded_keys.at<float>();
        if (wanted_) clear(grad_k_, keys_ * padded_);
        for (int64_t t = 0; t < tokens_;) {
            int64_t used = 0;
            for (count_ = 0; t < tokens_ && count_ < kMostBlocks; ++count_, t += kWidth) {
                Block block = plan(t);
                const int64_t bytes = round_up(block_bytes(block), 64);
                if (count_ > 0 && used + bytes > capacity) break;
                place(block, memory.at<float>(used));
                blocks_[count_] = block;
                used += bytes;
            }
            run_together(workers);
            for (int at = 0; at < count_; ++at) {
                *loss += blocks_[at].loss;
                for (bool counted : blocks_[at].counted) *count += counted;
            }
        }
        if (wanted_ && !direct)
            for (int64_t s = 0; s < keys_; ++s)
                memcpy(grad_k + s * index_dim_, grad_k_ + s * padded_, static_cast<size_t>(index_dim_) * 4);
    }
    return DSA_OK;
}

}  // namespace

int indexer_loss(const dsa_indexer_loss_args& args) {
    const int64_t batch = args.q.size[0], tokens = args.q.size[1], keys = args.k.size[1];
    const int64_t per_pair = args.q.size[2] * args.q.size[3] + 3 * args.q_index.size[2] * args.q_index.size[3];
    const int64_t read = args.indices.data != nullptr ? args.indices.size[2] : keys;
    // Below this, waking another thread costs more than it gives.
    const int threads = batch * tokens * read * per_pair < (1 << 19) ? 1 : args.threads;
    double loss = 0;
    int64_t count = 0;
    int status = DSA_OK;
    if (args.indices.data != nullptr) {
        status = indexer_loss_selected(args, threads, &loss, &count);
    } else {
        Visible visible(args, threads);
        status = visible.run(&loss, &count);
    }
    const double share = 1.0 / static_cast<double>(larger<int64_t>(count, 1));
    *static_cast<float*>(args.loss.data) = static_cast<float>(loss * share);
    if (args.grad_q.data != nullptr && status == DSA_OK) {
        scale_gradient(args.grad_q, static_cast<float>(share), threads);
        scale_gradient(args.grad_k, static_cast<float>(share), threads);
        scale_gradient(args.grad_w, static_cast<float>(share), threads);
    }
    return status;
}

}  // namespace dsa::DSA_ISA
