// The best keys of one query so far, and what a key must exceed to join them.
//
// Keys come from the newest to the oldest, so that of equal scores those that came first win, and a later one must
// exceed the lowest that is kept: ties need no comparison of positions.
#pragma once

#include "kernels/index_topk_lanes.h"

namespace dsa::DSA_ISA {
namespace {

// Vectors of keys scored at a time; their comparisons fill one word of bits.
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
constexpr int kChunk = kVectors * kWidth;

DSA_INLINE int count_bits(uint64_t bits) { return __builtin_popcountll(bits); }

class Candidates {
  public:
    // Candidates between two selections: as many again as are kept, so that a selection costs little for each.
    static int64_t capacity(int64_t wanted) { return round_up(2 * wanted + 256, kChunk) + kChunk; }

    // `order` and `position` have room for `capacity(wanted) + kWidth` each.
    void begin(int64_t wanted, int32_t* order, int32_t* position) {
        wanted_ = wanted;
        full_ = capacity(wanted) - kChunk;
        order_ = order;
        position_ = position;
        count_ = 0;
        kept_ = INT32_MIN;
        threshold_ = __builtin_nanf("");
        everything_ = ~uint64_t{0};
    }

    // A key joins if its score exceeds this or its bit is set in `everything`.
    DSA_INLINE float threshold() const { return threshold_; }
    DSA_INLINE uint64_t everything() const { return everything_; }

    int64_t count() const { return count_; }
    const int32_t* order() const { return order_; }
    const int32_t* position() const { return position_; }

    // Adds the chosen lanes of kVectors scores; the first lane's key has position `newest`, the next one `newest - 1`.
    void add(const F32* scores, uint64_t chosen, int64_t newest) {
        if (count_ > full_) shrink();
        const I32 first = broadcast(static_cast<int32_t>(newest)) - counting_up();
        for (int vector = 0; vector < kVectors; ++vector) {
            const uint32_t bits = chosen >> (vector * kWidth) & ((uint64_t{1} << kWidth) - 1);
            if (bits == 0) continue;
            store_chosen(order_ + count_, ordered(scores[vector]), bits);
            store_chosen(position_ + count_, first - broadcast(vector * kWidth), bits);
            count_ += count_bits(bits);
        }
    }

    // Adds pairs of ordered score and position, from the newest to the oldest.
    void add(const int32_t* order, const int32_t* position, int64_t count) {
        for (int64_t done = 0; done < count;) {
            if (count_ > full_) shrink();
            const int64_t some = smaller(count - done, full_ + kChunk - count_);
            memcpy(order_ + count_, order + done, static_cast<size_t>(some) * 4);
            memcpy(position_ + count_, position + done, static_cast<size_t>(some) * 4);
            count_ += some;
            done += some;
        }
    }

    // Keeps the best of them, in the order in which they came.
    void shrink() {
        if (count_ <= wanted_) return;
        if (wanted_ == 0) {
            count_ = 0;
            return;
        }
        store(order_ + count_, broadcast(INT32_MIN));  // Behind the last, less than any score.
        // More than `wanted_` exceed `low`, fewer exceed `high`.
        int64_t low = kept_ == INT32_MIN ? INT32_MIN : int64_t{kept_} - 1, high = highest(), equals = 0;
        while (high - low > 1) {
            const int64_t middle = low + (high - low) / 2;
            const int64_t better = count_above(static_cast<int32_t>(middle));
            if (better == wanted_) {
                low = high = middle;
                break;
            }
            (better > wanted_ ? low : high) = middle;
        }
        if (low != high) equals = wanted_ - count_above(static_cast<int32_t>(high));
        keep(static_cast<int32_t>(high), equals);
    }

  private:
    int32_t highest() const {
        I32 best = broadcast(INT32_MIN);
        for (int64_t i = 0; i < count_; i += kWidth) best = max(best, load(order_ + i));
        int32_t lanes[kWidth], result = INT32_MIN;
        store(lanes, best);
        for (int lane = 0; lane < kWidth; ++lane) result = larger(result, lanes[lane]);
        return result;
    }

    int64_t count_above(int32_t bound) const {
        const I32 bounds = broadcast(bound);
        int64_t count = 0;
        for (int64_t i = 0; i < count_; i += kWidth) count += count_bits(above(load(order_ + i), bounds));
        return count;
    }

    // Keeps what exceeds `bound`, and the first `equals` of those that equal it.
    void keep(int32_t bound, int64_t equals) {
        const I32 bounds = broadcast(bound);
        int64_t out = 0;
        for (int64_t i = 0; i < count_; i += kWidth) {
            const I32 order = load(order_ + i), position = load(position_ + i);
            uint32_t bits = above(order, bounds);
            if (equals > 0) {
                uint32_t same = equal(order, bounds);
                while (count_bits(same) > equals) same &= ~(uint32_t{1} << (31 - __builtin_clz(same)));
                equals -= count_bits(same);
                bits |= same;
            }
            store_chosen(order_ + out, order, bits);
            store_chosen(position_ + out, position, bits);
            out += count_bits(bits);
        }
        count_ = out;
        kept_ = INT32_MAX;
        for (int64_t i = 0; i < out; ++i) kept_ = smaller(kept_, order_[i]);
        threshold_ = score_of(kept_);
        // Below NaN is nothing, but every number exceeds it, and no comparison says so.
        everything_ = threshold_ == threshold_ ? 0 : ~uint64_t{0};
    }

    int64_t wanted_, full_, count_;
    int32_t *order_, *position_;
    int32_t kept_;
    float threshold_;
    uint64_t everything_;
};

}  // namespace
}  // namespace dsa::DSA_ISA
