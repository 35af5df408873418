// The best keys of one query so far, and what a key must exceed to join them.
//
// Keys come from the newest to the oldest, so that of equal scores those that came first win, and a later one must
// exceed the lowest that is kept: ties need no comparison of positions.
#pragma once

#include "kernels/index_topk_lanes.h"

namespace dsa::DSA_ISA {
namespace {

// Vectors of keys scored at a time.
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
constexpr int kChunk = kVectors * kWidth;
// Scores that are looked through at a time; a multiple of every kChunk.
constexpr int64_t kSpan = 512;
constexpr uint32_t kAllLanes = (uint32_t{1} << kWidth) - 1;

DSA_INLINE int count_bits(uint64_t bits) { return __builtin_popcountll(bits); }

// The lanes [begin, end) of a vector, as bits; both may lie outside of it.
DSA_INLINE uint32_t lanes_within(int64_t begin, int64_t end) {
    begin = larger<int64_t>(begin, 0);
    end = smaller<int64_t>(end, kWidth);
    if (begin >= end) return 0;
    return kAllLanes >> (kWidth - end) & kAllLanes << begin;
}

class Candidates {
  public:
    // Candidates between two selections: as many again as are kept, so that a selection costs little for each.
    static int64_t capacity(int64_t wanted) { return round_up(2 * wanted + 256, kChunk) + kSpan; }

    // `order` and `position` have room for `capacity(wanted) + kWidth` each. A `guess` that is a number lets only keys
    // join that exceed it: if `wanted` keys then have, they are the best of all, else everything begins again.
    void begin(int64_t wanted, int32_t* order, int32_t* position, float guess = __builtin_nanf("")) {
        wanted_ = wanted;
        full_ = capacity(wanted) - kSpan;
        order_ = order;
        position_ = position;
        count_ = 0;
        kept_ = INT32_MIN;
        guessed_ = guess == guess;
        threshold_ = guess;
        everything_ = guessed_ ? 0 : kAllLanes;
    }

    // Whether the guess was too high. Asked when all keys have come.
    bool guessed_too_high() const { return guessed_ && count_ < wanted_; }

    // A bound that the `wanted` best scores of what came exceed, close below the lowest of them: scores that equal it
    // may be many, zero above all. NaN if fewer came. Afterwards only `begin` may follow.
    float bound_of_kept() {
        if (count_ < wanted_) return __builtin_nanf("");
        shrink(wanted_);
        int32_t lowest = INT32_MAX;
        for (int64_t i = 0; i < count_; ++i) lowest = smaller(lowest, order_[i]);
        // One step lower, but below zero comes minus zero, which zero does not exceed.
        return lowest <= INT32_MIN + 1 ? __builtin_nanf("") : score_of(lowest == 0 ? -2 : lowest - 1);
    }

    // What a score must exceed to join; NaN while everything does.
    float threshold() const { return threshold_; }
    int64_t wanted() const { return wanted_; }
    int64_t count() const { return count_; }
    const int32_t* order() const { return order_; }
    const int32_t* position() const { return position_; }

    // Adds those scores that are good enough of up to kSpan / kChunk chunks of keys; score i of a chunk that begins at key c
    // is that of position `newest - c - i`. Keys outside [begin, end) are left out. Every score is stored where the next
    // candidate goes and stays if it is one: there is nothing to predict, and a wrong prediction costs more than scoring a
    // chunk.
    void add(const float* scores, const int32_t* chunks, int64_t chunk_count, int64_t begin, int64_t end, int64_t newest) {
        if (count_ > full_) shrink(wanted_ + wanted_ / 8);
        const F32 threshold = broadcast(threshold_);
        const I32 newest_first = broadcast(static_cast<int32_t>(newest)) - counting_up();
        int64_t count = count_;
        for (int64_t c = 0; c < chunk_count; ++c, scores += kChunk) {
            const int64_t first = chunks[c];
            const bool whole = first >= begin && first + kChunk <= end;
            I32 position = newest_first - broadcast(chunks[c]);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v, position = position - broadcast(kWidth)) {
                const F32 score = load(scores + v * kWidth);
                uint32_t chosen = (above(score, threshold) | everything_) & kAllLanes;
                if (!whole) chosen &= lanes_within(begin - first - v * kWidth, end - first - v * kWidth);
                store_chosen(order_ + count, ordered(score), chosen);
                store_chosen(position_ + count, position, chosen);
                count += count_bits(chosen);
            }
        }
        count_ = count;
    }

    // Adds pairs of ordered score and position, from the newest to the oldest.
    void add(const int32_t* order, const int32_t* position, int64_t count) {
        for (int64_t done = 0; done < count;) {
            if (count_ > full_) shrink(wanted_ + wanted_ / 8);
            const int64_t some = smaller(count - done, full_ + kSpan - count_);
            memcpy(order_ + count_, order + done, static_cast<size_t>(some) * 4);
            memcpy(position_ + count_, position + done, static_cast<size_t>(some) * 4);
            count_ += some;
            done += some;
        }
    }

    // Keeps the best `wanted` of them, in the order in which they came.
    void shrink() { shrink(wanted_); }

  private:
    // Keeps at least the best `wanted` and at most `most` of them, where equal scores allow: while more are to come,
    // any number between the two does, and is found sooner.
    void shrink(int64_t most) {
        if (count_ <= most) return;
        if (wanted_ == 0) {
            count_ = 0;
            return;
        }
        store(order_ + count_, broadcast(INT32_MIN));  // After the last, less than any score.
        // More than `most` exceed `low`, fewer than `wanted` exceed `high`.
        int64_t low = kept_ == INT32_MIN ? INT32_MIN : int64_t{kept_} - 1, high = highest(), equals = 0;
        int64_t above_low = count_, above_high = 0;
        bool found = false;
        for (bool halve = false; !found && high - low > 1; halve = !halve) {
            // In turn by proportion and by halves: the one is fast on most distributions, the other on all.
            const double share = halve ? 0.5
                                       : (static_cast<double>(above_low) - 0.5 * static_cast<double>(wanted_ + most)) /
                                             static_cast<double>(above_low - above_high);
            int64_t middle = low + static_cast<int64_t>(static_cast<double>(high - low) * share);
            middle = smaller(larger(middle, low + 1), high - 1);
            const int64_t better = count_above(static_cast<int32_t>(middle));
            if (better > most) {
                low = middle;
                above_low = better;
            } else {
                found = better >= wanted_;
                high = middle;
                above_high = better;
            }
        }
        if (!found) equals = wanted_ - count_above(static_cast<int32_t>(high));
        keep(static_cast<int32_t>(high), equals);
    }

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
        everything_ = threshold_ == threshold_ ? 0 : kAllLanes;
    }

    int64_t wanted_, full_, count_;
    int32_t *order_, *position_;
    int32_t kept_;
    bool guessed_;
    float threshold_;      // A key joins if its score exceeds this,
    uint32_t everything_;  // or if its lane is set here.
};

}  // namespace
}  // namespace dsa::DSA_ISA
