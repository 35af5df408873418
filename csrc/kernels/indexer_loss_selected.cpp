// Eq. 4: both distributions over the selected tokens. How it works: src/dsa/ops/indexer_loss/README.md.
//
// One query at a time; vectors run over the dims of a key, or over selected tokens. Gradients of the index keys are
// added in a second step, each thread to keys of its own, in the order of the queries.
#include "kernels/indexer_loss_tiles.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int64_t kTogetherBytes = 16 << 20;
constexpr int64_t kTile = 16;

DSA_INLINE float sum_lanes(F32 a) {
#if defined(__AVX512F__)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    return sum_of_four(lower_half_sum(half));
#elif defined(__AVX2__)
    return sum_of_four(lower_half_sum(a.v));
#else
    return reduce_add(a);
#endif
}

// out[r][n] = rows[n] . queries[r] for up to kRows heads and four keys; `dim` is a multiple of kWidth.
template <int kRows>
DSA_INLINE void dot_tile(const float* queries, int64_t query_row, const float* const* keys, int64_t dim, float* out,
                         int64_t out_row) {
    F32 sum[kRows][4];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) sum[r][n] = zero();
    for (int64_t d = 0; d < dim; d += kWidth) {
        F32 key[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) key[n] = load(keys[n] + d);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const F32 query = load(queries + r * query_row + d);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) sum[r][n] = fma(query, key[n], sum[r][n]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) out[r * out_row + n] = sum_lanes(sum[r][n]);
}

void dots(int64_t heads, const float* queries, int64_t query_row, const float* const* keys, int64_t dim, float* out,
          int64_t out_row) {
    int64_t h = 0;
    for (; h + 2 <= heads; h += 2)
        dot_tile<2>(queries + h * query_row, query_row, keys, dim, out + h * out_row, out_row);
    if (h < heads) dot_tile<1>(queries + h * query_row, query_row, keys, dim, out + h * out_row, out_row);
}

class Selected {
  public:
    Selected(const dsa_indexer_loss_args& args, int threads)
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
          padded_dim_(round_up(dim_, kWidth)),
          padded_index_(round_up(index_dim_, kWidth)),
          places_(round_up(args.indices.size[2], kTile)),
          wanted_(args.grad_q.data != nullptr) {}

    int run(double* loss, int64_t* count);

  private:
    const dsa_indexer_loss_args& args_;
    const int threads_;
    const int64_t tokens_, keys_, heads_, groups_, dim_, shared_, index_heads_, index_dim_, padded_dim_,
        padded_index_, places_;
    const bool wanted_;

    // What a query leaves for the second step: positions, what passed the ReLU [Hi][places], its queries times their
    // weights [Hi][padded], and the loss.
    struct Query {
        int32_t* positions;
        float *passed, *weighted;
        double loss;
        int64_t count;
        bool counted;
    };
    int64_t query_floats() const { return places_ * (1 + index_heads_) + index_heads_ * padded_index_; }
    // A worker's memory.
    struct Room {
        float *queries, *index_queries, *coefficient, *tile, *index_tile, *logits, *target, *scores, *kept, *sum;
    };
    int64_t room_floats() const {
        return heads_ * padded_dim_ + index_heads_ * (padded_index_ + kWidth) + kTile * padded_dim_ +
               places_ * (padded_index_ + shared_ + 3) + index_heads_ * padded_index_ + 16 * 10;
    }
    Room room(float* memory) const {
        Room room;
        auto take = [&](int64_t count) {
            float* here = memory;
            memory += round_up(count, 16);
            return here;
        };
        room.queries = take(heads_ * padded_dim_);
        room.index_queries = take(index_heads_ * padded_index_);
        room.coefficient = take(index_heads_);
        room.tile = take(kTile * padded_dim_);
        room.index_tile = take(places_ * padded_index_);
        room.logits = take(places_ * shared_);
        room.target = take(places_);
        room.scores = take(places_);
        room.kept = take(places_);
        room.sum = take(index_heads_ * padded_index_);
        return room;
    }
    void take(int64_t b, int64_t t, Query& query, const Room& room) const;
    void attend(int64_t b, int64_t group, const Query& query, const Room& room) const;
    void differentiate(int64_t b, int64_t t, const Query& query, const Room& room) const;
    void spread(const Query& query, int64_t first, int64_t last, float* grad_k) const;
};

// Adds the probabilities of one group's heads to the target.
void Selected::attend(int64_t b, int64_t group, const Query& query, const Room& room) const {
    const dsa_tensor& k = args_.k;
    const int64_t offset = b * k.stride[0] + group * k.stride[2], count = query.count;
    const bool direct = k.dtype == DSA_F32 && k.stride[3] == 1 && padded_dim_ == dim_;
    const float* queries = room.queries + group * shared_ * padded_dim_;
    for (int64_t first = 0; first < count; first += 4) {
        const float* rows[4];
        for (int64_t n = 0; n < 4; ++n) {
            const int64_t position = query.positions[smaller(first + n, count - 1)];
            if (direct) {
                rows[n] = static_cast<const float*>(k.data) + offset + position * k.stride[1];
            } else {
                read_row(k, offset + position * k.stride[1], room.tile + n * padded_dim_);
                rows[n] = room.tile + n * padded_dim_;
            }
        }
        dots(shared_, queries, padded_dim_, rows, padded_dim_, room.logits + first, places_);
    }
    const int64_t whole = round_up(count, kWidth);
    const F32 softcap = broadcast(args_.softcap);
    for (int64_t h = 0; h < shared_; ++h) {
        float* logits = room.logits + h * places_;
        for (int64_t i = count; i < whole; ++i) logits[i] = kLowest;
        F32 highest = broadcast(kLowest);
        for (int64_t i = 0; i < whole; i += kWidth) {
            F32 logit = load(logits + i);
            if (args_.softcap != 0.0f) {
                logit = capped(logit, softcap);
                store(logits + i, logit);
            }
            highest = max(logit, highest);
        }
        // What softcap made of the places after the last.
        for (int64_t i = count; i < whole; ++i) logits[i] = -INFINITY;
        const F32 top = broadcast(reduce_max(highest));
        F32 sums = zero();
        for (int64_t i = 0; i < whole; i += kWidth) {
            const F32 weight = exp(load(logits + i) - top);
            sums += weight;
            store(logits + i, weight);
        }
        F32 sum = broadcast(reduce_add(sums)), share = broadcast(1.0f);
        if (args_.sink_logits.data != nullptr) {
            const int64_t head = group * shared_ + h;
            const float sink = static_cast<const float*>(args_.sink_logits.data)[head * args_.sink_logits.stride[0]];
            const F32 of_sink = exp(broadcast(sink) - top);
            sum += of_sink;
            share = select_below(broadcast(1e38f), of_sink, zero(), share);
        }
        share = share / sum;
        for (int64_t i = 0; i < whole; i += kWidth)
            store(room.target + i, fma(load(logits + i), share, load(room.target + i)));
    }
}

void Selected::take(int64_t b, int64_t t, Query& query, const Room& room) const {
    const Range range = range_of(args_, b, t);
    const dsa_tensor &indices = args_.indices, &q = args_.q, &qi = args_.q_index, &w = args_.w_index;
    query.count = 0;
    query.loss = 0;
    query.counted = false;
    bool some = false;
    const int32_t* row = static_cast<const int32_t*>(indices.data) + b * indices.stride[0] + t * indices.stride[1];
    for (int64_t i = 0; i < indices.size[2]; ++i) {
        const int32_t position = row[i * indices.stride[2]];
        if (position < range.begin || position >= range.end) continue;
        const bool kept = position >= range.kept_begin && position < range.kept_end;
        some |= kept;
        room.kept[query.count] = kept ? 1.0f : 0.0f;
        query.positions[query.count++] = position;
    }
    if (!some) return;
    const int64_t count = query.count, whole = round_up(count, kWidth);
    for (int64_t i = count; i < whole; ++i) room.kept[i] = 0.0f;
    clear(room.target, whole);
    for (int64_t h = 0; h < heads_; ++h) {
        float* queries = room.queries + h * padded_dim_;
        read_row(q, b * q.stride[0] + t * q.stride[1] + h * q.stride[2], queries);
        for (int64_t d = 0; d < dim_; ++d) queries[d] *= args_.attention_scale;
    }
    for (int64_t group = 0; group < groups_; ++group) attend(b, group, query, room);
    const F32 half = broadcast(0.5f);
    F32 masses = zero();
    for (int64_t i = 0; i < whole; i += kWidth) {
        const F32 target = select_below(half, load(room.kept + i), load(room.target + i), zero());
        store(room.target + i, target);
        masses += target;
    }
    const float mass = reduce_add(masses);
    if (mass < kLeastMass) return;
    query.counted = true;

    read_row(w, b * w.stride[0] + t * w.stride[1], room.coefficient);
    for (int64_t j = 0; j < index_heads_; ++j) {
        room.coefficient[j] *= args_.index_scale;
        read_row(qi, b * qi.stride[0] + t * qi.stride[1] + j * qi.stride[2], room.index_queries + j * padded_index_);
    }
    const dsa_tensor& k = args_.k_index;
    for (int64_t i = 0; i < round_up(count, 4); ++i) {
        float* key = room.index_tile + i * padded_index_;
        if (i < count && room.kept[i] != 0.0f)
            read_row(k, b * k.stride[0] + query.positions[i] * k.stride[1], key);
        else
            clear(key, index_dim_);
    }
    for (int64_t first = 0; first < count; first += 4) {
        const float* rows[4];
        for (int64_t n = 0; n < 4; ++n) rows[n] = room.index_tile + (first + n) * padded_index_;
        dots(index_heads_, room.index_queries, padded_index_, rows, padded_index_, query.passed + first, places_);
    }
    for (int64_t j = 0; j < index_heads_; ++j) clear(query.passed + j * places_ + count, whole - count);
    const F32 lowest = broadcast(kLowest);
    F32 highest = lowest;
    for (int64_t i = 0; i < whole; i += kWidth) {
        F32 score = zero();
        for (int64_t j = 0; j < index_heads_; ++j) {
            float* at = query.passed + j * places_ + i;
            const F32 positive = max(zero(), load(at));
            store(at, positive);
            score = fma(broadcast(room.coefficient[j]), positive, score);
        }
        score = select_below(half, load(room.kept + i), score, lowest);
        store(room.scores + i, score);
        highest = max(score, highest);
    }
    const F32 top = broadcast(reduce_max(highest));
    F32 sums = zero();
    for (int64_t i = 0; i < whole; i += kWidth)
        sums += select_below(half, load(room.kept + i), exp(load(room.scores + i) - top), zero());
    const F32 sum = broadcast(reduce_add(sums)), all = broadcast(mass);
    const F32 log_sum = top + log(sum) + (sum - sum);
    F32 losses = zero();
    for (int64_t i = 0; i < whole; i += kWidth) {
        const F32 kept = load(room.kept + i), target = load(room.target + i) / all;
        const F32 predicted = load(room.scores + i) - log_sum;
        const F32 term = select_below(zero(), target, target * (log(target) - predicted), target);
        losses += select_below(half, kept, term, zero());
        store(room.scores + i, select_below(half, kept, exp(predicted) - target, zero()));
    }
    query.loss = static_cast<double>(reduce_add(losses));
    if (wanted_) differentiate(b, t, query, room);
}

// The gradients of the query's own tensors, and what the second step needs.
void Selected::differentiate(int64_t b, int64_t t, const Query& query, const Room& room) const {
    const int64_t count = query.count, whole = round_up(count, kWidth), at = (b * tokens_ + t) * index_heads_;
    for (int64_t j = 0; j < index_heads_; ++j) {
        float* passed = query.passed + j * places_;
        F32 sum = zero();
        for (int64_t i = 0; i < whole; i += kWidth) {
            const F32 dot = load(passed + i), grad = load(room.scores + i);
            sum = fma(grad, dot, sum);
            store(passed + i, select_below(zero(), dot, grad, zero()));
        }
        static_cast<float*>(args_.grad_w.data)[at + j] = reduce_add(sum) * args_.index_scale;
    }
    // grad_q[j] = coefficient[j] * sum over selected tokens of passed[j] * key.
    product<false>(padded_index_ / kWidth, room.index_tile, padded_index_, query.passed, places_, 1, index_heads_, count,
                   room.sum, padded_index_);
    for (int64_t j = 0; j < index_heads_; ++j) {
        float* grad = static_cast<float*>(args_.grad_q.data) + (at + j) * index_dim_;
        for (int64_t d = 0; d < index_dim_; ++d) {
            grad[d] = room.sum[j * padded_index_ + d] * room.coefficient[j];
            query.weighted[j * padded_index_ + d] = room.index_queries[j * padded_index_ + d] * room.coefficient[j];
        }
        for (int64_t d = index_dim_; d < padded_index_; ++d) query.weighted[j * padded_index_ + d] = 0.0f;
    }
}

// Adds a query's part to the gradients of the keys in [first, last).
void Selected::spread(const Query& query, int64_t first, int64_t last, float* grad_k) const {
    for (int64_t i = 0; i < query.count; ++i) {
        const int64_t position = query.positions[i];
        if (position < first || position >= last) continue;
        product<true>(padded_index_ / kWidth, query.weighted, padded_index_, query.passed + i, 0, places_, 1,
                      index_heads_, grad_k + position * padded_index_, padded_index_);
    }
}

int Selected::run(double* loss, int64_t* count) {
    const int64_t query_bytes = round_up(4 * query_floats(), 64), room_bytes = round_up(4 * room_floats(), 64);
    const int64_t at_once = larger<int64_t>(1, smaller(tokens_, kTogetherBytes / query_bytes));
    const int workers = threads_ > 1 ? threads_ : 1;
    const bool direct = padded_index_ == index_dim_;
    Scratch rooms(room_bytes * workers), memory(query_bytes * at_once);
    Scratch list(static_cast<int64_t>(sizeof(Query)) * at_once);
    Scratch padded_keys(wanted_ && !direct ? 4 * keys_ * padded_index_ : 0);
    if (rooms.failed() || memory.failed() || list.failed() || padded_keys.failed()) return DSA_OUT_OF_MEMORY;
    // The padding of dims is never written again.
    memset(rooms.at<char>(), 0, static_cast<size_t>(room_bytes * workers));
    Query* queries = list.at<Query>();
    for (int64_t b = 0; b < args_.q.size[0]; ++b) {
        float* out = wanted_ ? static_cast<float*>(args_.grad_k.data) + b * keys_ * index_dim_ : nullptr;
        float* grad_k = direct ? out : padded_keys.at<float>();
        if (wanted_) clear(grad_k, keys_ * padded_index_);
        for (int64_t first = 0; first < tokens_; first += at_once) {
            const int64_t here = smaller(at_once, tokens_ - first);
            for_each_item(here, threads_, [&](int64_t i, int worker) {
                Query& query = queries[i];
                query.positions = memory.at<int32_t>(i * query_bytes);
                query.passed = memory.at<float>(i * query_bytes) + places_;
                query.weighted = query.passed + index_heads_ * places_;
                take(b, first + i, query, room(rooms.at<float>(worker * room_bytes)));
                if (!wanted_ || query.counted) return;
                const int64_t at = (b * tokens_ + first + i) * index_heads_;
                clear(static_cast<float*>(args_.grad_w.data) + at, index_heads_);
                clear(static_cast<float*>(args_.grad_q.data) + at * index_dim_, index_heads_ * index_dim_);
            });
            for (int64_t i = 0; i < here; ++i) {
                *loss += queries[i].loss;
                *count += queries[i].counted;
            }
            if (!wanted_) continue;
            for_each_item(workers, workers, [&](int64_t part, int) {
                for (int64_t i = 0; i < here; ++i)
                    if (queries[i].counted)
                        spread(queries[i], keys_ * part / workers, keys_ * (part + 1) / workers, grad_k);
            });
        }
        if (wanted_ && !direct)
            for (int64_t s = 0; s < keys_; ++s)
                memcpy(out + s * index_dim_, grad_k + s * padded_index_, static_cast<size_t>(index_dim_) * 4);
    }
    return DSA_OK;
}

}  // namespace

int indexer_loss_selected(const dsa_indexer_loss_args& args, int threads, double* loss, int64_t* count) {
    return Selected(args, threads).run(loss, count);
}

}  // namespace dsa::DSA_ISA
