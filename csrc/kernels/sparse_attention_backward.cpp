// Gradients of attention over selected tokens. Interface: dsa/sparse_attention.h.
//
// Block by block of queries, in two phases. The first goes by query: it recomputes the weights from lse, finishes the
// query's own gradient, and keeps the two factors of every (query, place, head), dx and p, that the rows' gradients are
// sums of. The second goes by selected token: a counting sort has listed the places that hold it, and its sums are
// taken in registers, in that order. So no two threads add into one place and no order depends on their number.
#include "dsa/sparse_attention.h"

#include "kernels/sparse_attention_tile.h"

namespace dsa::DSA_ISA {
namespace {

constexpr double kSerialWork = 400e3;
// Factors of one block of queries, and the queries that one slice of columns reads again and again.
constexpr int64_t kFactorBytes = 8 << 20;
constexpr int64_t kSliceBytes = 512 << 10;
constexpr int64_t kMostQueries = 1024;
// Sums of one row that are taken together: as many as it needs to keep the multipliers busy.
constexpr int kColumnVectors = 8;

struct Problem {
    const dsa_sparse_attention_backward_args& args;
    int64_t tokens, heads, dim, keys, groups, value_dim, places;
    int64_t shared, padded_dim, padded_value_dim, padded_places;
    int64_t block;                     // queries
    const RowKernels &key_kernels, &value_kernels;

    explicit Problem(const dsa_sparse_attention_backward_args& args)
        : args(args),
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
          padded_places(round_up(places, kWidth)),
          block(larger<int64_t>(
              smaller(smaller(kFactorBytes / larger<int64_t>(places * heads * 8, 1), kMostQueries), tokens), 1)),
          key_kernels(kRowKernels[args.k.dtype]),
          value_kernels(kRowKernels[args.v.dtype]) {}

    const int32_t* places_of(int64_t b, int64_t t) const {
        return static_cast<const int32_t*>(args.indices.data) + b * args.indices.stride[0] + t * args.indices.stride[1];
    }
};

// A place that holds some token: its query, and where its factors lie, counted in places of the block.
struct Entry {
    int32_t query, place;
};

// Entries whose factors are asked for ahead: they are scattered over the block.
constexpr int64_t kEntriesAhead = 8;

// Shared memory of one block of queries.
struct Block {
    int64_t b, first, queries;
    float *q, *grad_out;  // [queries, heads, padded dim]: q times the scale
    float* factors;       // [queries, places, 2, heads]: dx, then p; places in the order of the selected ones
    float* grad_sink;     // [queries, heads]
    int32_t* ends;        // [keys]: end of each token's entries, which begin where the one before ends
    Entry* entries;          // by token; kEntriesAhead more are there to be read
};

// Memory of one thread.
struct Worker {
    float *weights, *grads, *slopes;  // [kRowsAtOnce, padded places]: p, dp and then dx, derivative of the softcap
    float* grad_q;                    // [kRowsAtOnce, padded dim]
    int32_t* rows;                    // [padded places]

    static int64_t bytes(const Problem& p) {
        return round_up(p.padded_places * (kRowsAtOnce * 12 + 4) + kRowsAtOnce * p.padded_dim * 4 + 64, 64);
    }
    Worker(const Problem& p, char* memory) {
        weights = reinterpret_cast<float*>(memory);
        grads = weights + kRowsAtOnce * p.padded_places;
        slopes = grads + kRowsAtOnce * p.padded_places;
        grad_q = slopes + kRowsAtOnce * p.padded_places;
        rows = reinterpret_cast<int32_t*>(grad_q + kRowsAtOnce * p.padded_dim);
    }
};

// log(exp lse + exp sink), with 0 in the place of -infinity.
float normaliser(float lse, const float* sink) {
    if (!sink) return lse == -INFINITY ? 0.0f : lse;
    const float top = larger(lse, *sink);
    if (top == -INFINITY) return 0.0f;
    return logf(expf(lse - top) + expf(*sink - top)) + top;
}

// Turns scores in `weights` and products grad_out . v in `grads` into p and dx. Returns sum p dp.
DSA_INLINE float differentiate(const Problem& p, int count, float normal, float* weights, float* grads, float* slopes) {
    const float softcap = p.args.softcap;
    F32 mean_lanes = zero();
    const F32 origin = broadcast(normal), cap = broadcast(softcap), one = broadcast(1.0f);
    const int padded = static_cast<int>(round_up(count, kWidth));
    for (int i = 0; i < padded; i += kWidth) {
        F32 score = load(weights + i);
        if (softcap != 0.0f) {
            const F32 ratio = tanh(score / cap);
            score = cap * ratio;
            store(slopes + i, one - ratio * ratio);
        }
        // No probability is above 1. Of scores that are large `normal` has lost the places that say so.
        store(weights + i, exp(min(zero(), score - origin)));
    }
    for (int i = count; i < padded; ++i) weights[i] = grads[i] = 0.0f;
    for (int i = 0; i < padded; i += kWidth) mean_lanes = fma(load(weights + i), load(grads + i), mean_lanes);
    const float mean = reduce_add(mean_lanes);
    for (int i = 0; i < padded; i += kWidth) {
        F32 grad = (load(grads + i) - broadcast(mean)) * load(weights + i);
        if (softcap != 0.0f) grad *= load(slopes + i);
        store(grads + i, grad);
    }
    return mean;
}

void differentiate_query(const Problem& p, const Block& block, int64_t query, const Worker& worker) {
    const int64_t b = block.b, t = block.first + query;
    float* q = block.q + query * p.heads * p.padded_dim;
    float* grad_out = block.grad_out + query * p.heads * p.padded_value_dim;
    pack_heads(p.args.q, b, t, p.args.scale, q);
    pack_heads(p.args.grad_out, b, t, 1.0f, grad_out);
    bool outside = false;
    const int count = select_places(p.places_of(b, t), static_cast<int>(p.places), p.keys, worker.rows, &outside);
    const dsa_tensor &lse = p.args.lse, &sink = p.args.sink_logits, &grad_q = p.args.grad_q;
    const Rows nothing{};
    float* factors = block.factors + query * p.places * 2 * p.heads;
    for (int64_t h = 0; h < p.heads;) {
        const int64_t g = h / p.shared;
        const int rows = rows_of_pass((g + 1) * p.shared - h);
        for (int first = 0; first < count; first += kTileKeys) {
            const int here = smaller(kTileKeys, count - first);
            p.key_kernels.dot[rows](q + h * p.padded_dim, p.padded_dim, head_rows(p.args.k, b, g, worker.rows + first), here, p.dim,
                                    worker.weights + first, p.padded_places, nothing);
            p.value_kernels.dot[rows](grad_out + h * p.padded_value_dim, p.padded_value_dim, head_rows(p.args.v, b, g, worker.rows + first),
                                      here, p.value_dim, worker.grads + first, p.padded_places, nothing);
        }
        for (int r = 0; r < rows; ++r) {
            const float log_sum =
                static_cast<const float*>(lse.data)[b * lse.stride[0] + t * lse.stride[1] + (h + r) * lse.stride[2]];
            const float logit = sink.data ? element(sink, (h + r) * sink.stride[0]) : 0.0f;
            const float normal = normaliser(log_sum, sink.data ? &logit : nullptr);
            float *weights = worker.weights + r * p.padded_places, *grads = worker.grads + r * p.padded_places;
            const float mean = differentiate(p, count, normal, weights, grads, worker.slopes + r * p.padded_places);
            if (p.args.grad_sink.data) block.grad_sink[query * p.heads + h + r] = expf(logit - normal) * mean;
            if (!block.factors) continue;
            float* factor = factors + h + r;
            for (int i = 0; i < count; ++i, factor += 2 * p.heads) {
                factor[0] = grads[i];
                factor[p.heads] = weights[i];
            }
        }
        if (grad_q.data) {
            const float none[kRowsAtOnce] = {};
            memset(worker.grad_q, 0, static_cast<size_t>(rows * p.padded_dim) * 4);
            p.key_kernels.mix[rows](worker.grads, p.padded_places, head_rows(p.args.k, b, g, worker.rows), count, p.dim, none, worker.grad_q,
                                    p.padded_dim, nothing);
            for (int r = 0; r < rows; ++r) {
                float* row = worker.grad_q + r * p.padded_dim;
                for (int64_t i = 0; i < p.padded_dim; i += kWidth) store(row + i, load(row + i) * broadcast(p.args.scale));
                store_row(grad_q, b * grad_q.stride[0] + t * grad_q.stride[1] + (h + r) * grad_q.stride[2], p.dim, row);
            }
        }
        h += rows;
    }
}

// Lists the places of a block's queries by the token that they hold, each token's in the order of the queries.
void sort_places(const Problem& p, const Block& block) {
    memset(block.ends, 0, static_cast<size_t>(p.keys) * 4);
    const uint32_t limit = static_cast<uint32_t>(p.keys);
    for (int64_t query = 0; query < block.queries; ++query) {
        const int32_t* places = p.places_of(block.b, block.first + query);
        for (int64_t i = 0; i < p.places; ++i)
            if (static_cast<uint32_t>(places[i]) < limit) ++block.ends[places[i]];
    }
    int32_t begin = 0;
    for (int64_t s = 0; s < p.keys; ++s) {
        const int32_t count = block.ends[s];
        block.ends[s] = begin;
        begin += count;
    }
    for (int64_t query = 0; query < block.queries; ++query) {
        const int32_t* places = p.places_of(block.b, block.first + query);
        Entry entry{static_cast<int32_t>(query), static_cast<int32_t>(query * p.places)};
        for (int64_t i = 0; i < p.places; ++i) {
            if (static_cast<uint32_t>(places[i]) >= limit) continue;
            block.entries[block.ends[places[i]]++] = entry;
            ++entry.place;
        }
    }
    memset(block.entries + begin, 0, kEntriesAhead * sizeof(Entry));
}

// Adds to kVectors vectors of one row's gradient what its entries bring: factor[h] * packed[h] over the heads.
template <int kVectors>
DSA_INLINE void accumulate_columns(const Problem& p, const Entry* entries, int64_t count, const float* factors,
                                   const float* packed, int64_t packed_stride, float* grad,
                                   int64_t lanes) {
    F32 sum[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) sum[c] = zero();
    for (int64_t e = 0; e < count; ++e) {
        const float* factor = factors + static_cast<int64_t>(entries[e].place) * 2 * p.heads;
        const float* row = packed + entries[e].query * p.heads * packed_stride;
        __builtin_prefetch(factors + static_cast<int64_t>(entries[e + kEntriesAhead].place) * 2 * p.heads);
        for (int64_t h = 0; h < p.shared; ++h) {
            const F32 x = broadcast(factor[h]);
#pragma GCC unroll 8
            for (int c = 0; c < kVectors; ++c) sum[c] = fma(x, load(row + h * packed_stride + c * kWidth), sum[c]);
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
        const int64_t here = lanes - c * kWidth;
        if (here >= kWidth)
            store(grad + c * kWidth, load(grad + c * kWidth) + sum[c]);
        else if (here > 0)
            store_partial(grad + c * kWidth, load_partial(grad + c * kWidth, here) + sum[c], here);
    }
}

// Adds a block's part of the gradient of rows [first, last) of k or v: `which` is 0 for dx, q and 1 for p, grad_out.
void accumulate_rows(const Problem& p, const Block& block, const dsa_tensor& grad, int64_t which, int64_t first,
                     int64_t last) {
    const float* packed = which ? block.grad_out : block.q;
    const int64_t dim = grad.size[3], stride = round_up(dim, kWidth);
    const int64_t at_once = kColumnVectors * kWidth;
    // Few columns at a time, so that those of all the block's queries stay in the cache while the tokens go by.
    const int64_t fitting = kSliceBytes / (block.queries * p.heads * 4) / at_once * at_once;
    const int64_t slice = larger(at_once, smaller(fitting, stride));
    for (int64_t column = 0; column < dim; column += slice) {
        const int64_t end = smaller(column + slice, stride);
        for (int64_t s = first; s < last; ++s) {
            const int32_t begin = s ? block.ends[s - 1] : 0;
            const int64_t count = block.ends[s] - begin;
            if (count == 0) continue;
            for (int64_t g = 0; g < p.groups; ++g) {
                float* row = static_cast<float*>(grad.data) + block.b * grad.stride[0] + s * grad.stride[1] + g * grad.stride[2];
                const float* factors = block.factors + which * p.heads + g * p.shared;
                const float* heads = packed + g * p.shared * stride;
                int64_t c = column;
                for (; c + at_once <= end; c += at_once)
                    accumulate_columns<kColumnVectors>(p, block.entries + begin, count, factors, heads + c, stride,
                                                       row + c, dim - c);
                for (; c + at_once / 2 <= end; c += at_once / 2)
                    accumulate_columns<kColumnVectors / 2>(p, block.entries + begin, count, factors, heads + c, stride,
                                                           row + c, dim - c);
                for (; c < end; c += kWidth)
                    accumulate_columns<1>(p, block.entries + begin, count, factors, heads + c, stride, row + c,
                                          dim - c);
            }
        }
    }
}

void clear_rows(const dsa_tensor& grad, int64_t b, int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s)
        for (int64_t g = 0; g < grad.size[2]; ++g) {
            float* row = static_cast<float*>(grad.data) + b * grad.stride[0] + s * grad.stride[1] + g * grad.stride[2];
            memset(row, 0, static_cast<size_t>(grad.size[3]) * 4);
        }
}

}  // namespace

int sparse_attention_backward(const dsa_sparse_attention_backward_args& args) {
    const Problem p(args);
    const int64_t batch = args.q.size[0];
    const double work = static_cast<double>(batch) * p.tokens * p.places * p.heads * (p.dim + p.value_dim);
    const int threads = work < kSerialWork ? 1 : larger(args.threads, 1);
    const bool rows_wanted = args.grad_k.data || args.grad_v.data;
    const int64_t ranges = smaller<int64_t>(larger<int64_t>(64, 8 * threads), larger<int64_t>(p.keys, 1));
    const int64_t range = ceil_div(p.keys, ranges);

    const int64_t q_bytes = round_up(p.block * p.heads * p.padded_dim * 4, 64);
    const int64_t grad_out_bytes = round_up(p.block * p.heads * p.padded_value_dim * 4, 64);
    const int64_t factor_bytes = rows_wanted ? round_up(p.block * p.places * 2 * p.heads * 4, 64) : 0;
    const int64_t sink_bytes = round_up(p.block * p.heads * 4, 64);
    const int64_t end_bytes = rows_wanted ? round_up(p.keys * 4, 64) : 0;
    const int64_t entry_bytes = rows_wanted ? round_up((p.block * p.places + kEntriesAhead) * static_cast<int64_t>(sizeof(Entry)), 64) : 0;
    const int64_t total_bytes = round_up(p.heads * 8, 64), worker_bytes = Worker::bytes(p);
    Scratch scratch(q_bytes + grad_out_bytes + factor_bytes + sink_bytes + end_bytes + entry_bytes + total_bytes +
                    threads * worker_bytes);
    if (scratch.failed()) return DSA_OUT_OF_MEMORY;
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
        char* memory = scratch.at<char>(used);
        used += bytes;
        return memory;
    };
    Block block{};
    block.q = reinterpret_cast<float*>(take(q_bytes));
    block.grad_out = reinterpret_cast<float*>(take(grad_out_bytes));
    char* factors = take(factor_bytes);
    block.factors = rows_wanted ? reinterpret_cast<float*>(factors) : nullptr;
    block.grad_sink = reinterpret_cast<float*>(take(sink_bytes));
    block.ends = reinterpret_cast<int32_t*>(take(end_bytes));
    block.entries = reinterpret_cast<Entry*>(take(entry_bytes));
    double* sink_total = reinterpret_cast<double*>(take(total_bytes));
    char* workers = take(threads * worker_bytes);
    for (int64_t h = 0; h < p.heads; ++h) sink_total[h] = 0.0;

    if (rows_wanted && range) {
        for_each_item(args.k.size[0] * ranges, threads, [&](int64_t item, int) {
            const int64_t b = item / ranges, first = smaller(item % ranges * range, p.keys);
            const int64_t last = smaller(first + range, p.keys);
            if (args.grad_k.data) clear_rows(args.grad_k, b, first, last);
            if (args.grad_v.data) clear_rows(args.grad_v, b, first, last);
        });
    }
    for (block.b = 0; block.b < batch; ++block.b) {
        for (block.first = 0; block.first < p.tokens; block.first += p.block) {
            block.queries = smaller(p.block, p.tokens - block.first);
            // The sort reads nothing that the queries write: it is one more item, the first, for it takes longest.
            for_each_item(block.queries + 1, threads, [&](int64_t item, int worker) {
                if (item > 0)
                    differentiate_query(p, block, item - 1, Worker(p, workers + worker * worker_bytes));
                else if (rows_wanted)
                    sort_places(p, block);
            });
            if (rows_wanted && range) {
                for_each_item(ranges, threads, [&](int64_t item, int) {
                    const int64_t first = smaller(item * range, p.keys), last = smaller(first + range, p.keys);
                    if (args.grad_k.data) accumulate_rows(p, block, args.grad_k, 0, first, last);
                    if (args.grad_v.data) accumulate_rows(p, block, args.grad_v, 1, first, last);
                });
            }
            if (args.grad_sink.data)
                for (int64_t query = 0; query < block.queries; ++query)
                    for (int64_t h = 0; h < p.heads; ++h) sink_total[h] -= block.grad_sink[query * p.heads + h];
        }
    }
    if (args.grad_sink.data)
        for (int64_t h = 0; h < p.heads; ++h)
            static_cast<float*>(args.grad_sink.data)[h * args.grad_sink.stride[0]] = static_cast<float>(sink_total[h]);
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
