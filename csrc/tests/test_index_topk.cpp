// The fused indexer and selection, against a sort of every row of scores.
#include "dsa/index_topk.h"

#include <algorithm>

#include "check.h"

using namespace dsa_test;

namespace {

struct Shape {
    int64_t batch, tokens, keys, heads, dim;
    int32_t top_k, sinks, local;
    bool ranges, int8, tied;
    bool few_dims = false;  // whether nearly all of a product comes from few dims, as in a trained indexer
    int64_t selections = 0;  // of each query; 0 leaves the dim out
};

// Rows of whole numbers that reach `levels`: eight bits hold them as they are, with scale 1, where no rotation comes
// before. Floating products of such numbers are exact too, so one expectation serves both forms.
std::vector<float> whole_numbers(int64_t rows, const Shape& s, int levels, std::mt19937& generator) {
    const int64_t dim = s.dim;
    std::uniform_int_distribution<int> distribution(s.tied ? -1 : -levels, s.tied ? 1 : levels), small(-2, 2);
    std::vector<float> values(static_cast<size_t>(rows * dim));
    for (size_t i = 0; i < values.size(); ++i)
        values[i] = static_cast<float>(s.few_dims && static_cast<int64_t>(i) % dim > 8 ? small(generator) : distribution(generator));
    for (int64_t row = 0; row < rows; ++row) values[row * dim] = static_cast<float>(levels);
    return values;
}

std::vector<int32_t> expected_row(const std::vector<float>& scores, int64_t first, int64_t last, const Shape& s) {
    std::vector<int32_t> order;
    for (int64_t p = first; p < last; ++p) order.push_back(static_cast<int32_t>(p));
    const auto forced = [&](int64_t p) { return p < first + s.sinks || p >= last - s.local; };
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        if (forced(a) != forced(b)) return forced(a);
        const bool unknown_a = std::isnan(scores[a]), unknown_b = std::isnan(scores[b]);
        if (unknown_a != unknown_b) return unknown_b;
        if (!unknown_a && scores[a] != scores[b]) return scores[a] > scores[b];
        return a > b;
    });
    order.resize(std::min<size_t>(order.size(), static_cast<size_t>(s.top_k)));
    std::sort(order.begin(), order.end());
    order.resize(static_cast<size_t>(s.top_k), -1);
    return order;
}

void check_shape(const Shape& s, int threads, unsigned seed) {
    std::mt19937 generator(seed);
    auto query = whole_numbers(s.batch * s.tokens * s.heads, s, 63, generator);
    auto key = whole_numbers(s.batch * s.keys, s, 127, generator);
    const int64_t selections = std::max<int64_t>(1, s.selections);
    auto weight = normal(s.batch * s.tokens * selections * s.heads, seed + 1);
    auto key_scale = normal(s.batch * s.keys, seed + 2);
    if (s.tied) {
        for (auto& w : weight) w = std::copysign(1.0f, w);
        for (auto& k : key_scale) k = 1.0f;
    }
    if (s.keys > 5) key_scale[5] = NAN;
    if (!s.int8) std::fill(key_scale.begin(), key_scale.end(), 1.0f);
    std::vector<int8_t> bytes(key.size());
    std::transform(key.begin(), key.end(), bytes.begin(), [](float x) { return static_cast<int8_t>(x); });
    std::vector<int32_t> start(s.batch * s.tokens), end(s.batch * s.tokens);
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t t = 0; t < s.tokens; ++t) {
            const int64_t row = b * s.tokens + t;
            start[row] = 0;
            end[row] = static_cast<int32_t>(std::max<int64_t>(0, s.keys - s.tokens + t + 1));
            if (!s.ranges) continue;
            start[row] = static_cast<int32_t>(generator() % (s.keys + 1));
            end[row] = static_cast<int32_t>(generator() % (s.keys + 1));
        }
    std::vector<int32_t> selection(s.batch * s.tokens * selections * s.top_k, INT32_MAX);
    dsa_index_topk_args args{};
    args.query = tensor(query, {s.batch, s.tokens, s.heads, s.dim}, DSA_F32);
    args.key = s.int8 ? tensor(bytes, {s.batch, s.keys, s.dim}, DSA_I8) : tensor(key, {s.batch, s.keys, s.dim}, DSA_F32);
    if (s.int8) args.key_scale = tensor(key_scale, {s.batch, s.keys}, DSA_F32);
    args.weight = s.selections ? tensor(weight, {s.batch, s.tokens, selections, s.heads}, DSA_F32)
                               : tensor(weight, {s.batch, s.tokens, s.heads}, DSA_F32);
    if (s.ranges) args.key_start = tensor(start, {s.batch, s.tokens}, DSA_I32);
    if (s.ranges) args.key_end = tensor(end, {s.batch, s.tokens}, DSA_I32);
    args.selection = s.selections ? tensor(selection, {s.batch, s.tokens, selections, s.top_k}, DSA_I32)
                                  : tensor(selection, {s.batch, s.tokens, s.top_k}, DSA_I32);
    args.scale = 0.37f;
    args.sinks = s.sinks;
    args.local = s.local;
    args.threads = threads;
    CHECK(dsa_index_topk(&args) == DSA_OK);

    // Sorting every row of many queries would take minutes.
    const int64_t every = std::max<int64_t>(1, s.batch * s.tokens * selections / 64);
    std::vector<float> scores(static_cast<size_t>(s.keys));
    for (int64_t at = 0; at < s.batch * s.tokens * selections; at += every) {
        const int64_t row = at / selections;
        for (int64_t p = 0; p < s.keys; ++p) {
            const int64_t k = row / s.tokens * s.keys + p;
            float score = 0.0f;
            for (int64_t head = 0; head < s.heads; ++head) {
                const int64_t q = row * s.heads + head;
                int dot = 0;
                for (int64_t i = 0; i < s.dim; ++i)
                    dot += static_cast<int>(query[q * s.dim + i]) * static_cast<int>(key[k * s.dim + i]);
                score = score + (weight[at * s.heads + head] * args.scale) * static_cast<float>(std::max(dot, 0));
            }
            scores[p] = score * key_scale[k];
        }
        const auto expected = expected_row(scores, start[row], end[row], s);
        CHECK(std::equal(expected.begin(), expected.end(), selection.begin() + at * s.top_k));
    }
}

void selections_are_those_of_a_sort(int threads) {
    unsigned seed = 0;
    for (bool int8 : {true, false})
        for (bool tied : {false, true}) {
            check_shape({2, 37, 401, 4, 24, 19, 2, 3, false, int8, tied}, threads, ++seed);
            check_shape({1, 70, 333, 5, 7, 16, 0, 0, true, int8, tied}, threads, ++seed);
            check_shape({2, 3, 1500, 9, 40, 700, 1, 600, true, int8, tied}, threads, ++seed);
            check_shape({1, 2, 17000, 3, 3, 300, 1, 0, false, int8, tied}, threads, ++seed);
            check_shape({1, 1, 9001, 8, 33, 4097, 0, 1, false, int8, tied}, threads, ++seed);
            check_shape({1, 5, 40, 1, 1, 6, 2, 4, true, int8, tied}, threads, ++seed);
            check_shape({1, 4, 0, 1, 5, 3, 0, 0, false, int8, tied}, threads, ++seed);
            check_shape({2, 37, 401, 5, 24, 19, 2, 3, true, int8, tied, false, 3}, threads, ++seed);
            check_shape({1, 1, 9001, 4, 33, 300, 1, 1, false, int8, tied, false, 2}, threads, ++seed);
            check_shape({1, 9, 17000, 3, 3, 40, 0, 0, false, int8, tied, false, 4}, threads, ++seed);
        }
    // Enough queries and keys for bounds, which are tight in the first.
    for (bool int8 : {true, false}) {
        check_shape({1, 600, 3000, 8, 17, 70, 2, 40, false, int8, false, true}, threads, ++seed);
        check_shape({2, 300, 3000, 9, 17, 90, 0, 0, true, int8, false}, threads, ++seed);
        check_shape({1, 600, 3000, 6, 17, 70, 2, 40, false, int8, false, true, 3}, threads, ++seed);
    }
}

void ranges_outside_the_keys_are_refused(int threads) {
    std::vector<float> query(8), key(8), weight(2);
    std::vector<int32_t> bound{0, 5}, selection(2);
    dsa_index_topk_args args{};
    args.query = tensor(query, {1, 2, 1, 4}, DSA_F32);
    args.key = tensor(key, {1, 2, 4}, DSA_F32);
    args.weight = tensor(weight, {1, 2, 1}, DSA_F32);
    args.key_end = tensor(bound, {1, 2}, DSA_I32);
    args.selection = tensor(selection, {1, 2, 1}, DSA_I32);
    args.scale = 1.0f;
    args.threads = threads;
    CHECK(dsa_index_topk(&args) == DSA_OUT_OF_RANGE);
    bound[1] = -1;
    CHECK(dsa_index_topk(&args) == DSA_OUT_OF_RANGE);
    bound[1] = 2;
    CHECK(dsa_index_topk(&args) == DSA_OK);
    CHECK(selection[0] == -1 && selection[1] == 1);
}

}  // namespace

int main() {
    return on_every_isa([](int threads) {
        selections_are_those_of_a_sort(threads);
        ranges_outside_the_keys_are_refused(threads);
    });
}
