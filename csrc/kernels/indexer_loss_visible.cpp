// Eq. 3: both distributions over all visible tokens, in two passes over the keys. How it works:
// src/dsa/ops/indexer_loss/README.md.
#include "kernels/indexer_loss_visible.h"

namespace dsa::DSA_ISA {
namespace {

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
            const F32 of_sink = exp(broadcast(sink) - top);
            sum += of_sink;
            share = select_below(broadcast(1e38f), of_sink, zero(), share);
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

int indexer_loss_visible(const dsa_indexer_loss_args& args, int threads, double* loss, int64_t* count) {
    Visible visible(args, threads);
    return visible.run(loss, count);
}

}  // namespace dsa::DSA_ISA
