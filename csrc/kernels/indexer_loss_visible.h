// Eq. 3: a block of queries, how it lies in memory, and the keys that it meets.
//
// A vector's lanes are neighbouring queries, a block. Keys come in chunks on a fixed grid, each worked on by one
// thread, so that no sum depends on how many threads there are.
#pragma once

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

}  // namespace
}  // namespace dsa::DSA_ISA
