// Index queries, weights and keys of a few tokens, against the formulas in double precision.
#include "dsa/index_projection.h"

#include "check.h"

using namespace dsa_test;

namespace {

constexpr int64_t kBatch = 2, kTokens = 3, kWidth = 577, kHeads = 3, kDim = 24, kTurned = 10, kBegin = 2, kCapacity = kBegin + kTokens + 1;

std::vector<double> project(const float* hidden, const std::vector<float>& weight, int64_t rows) {
    std::vector<double> out(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < kWidth; ++i) out[r] += static_cast<double>(hidden[i]) * weight[r * kWidth + i];
    return out;
}

void turn(double* row, const float* cosine, const float* sine) {
    std::vector<double> before(row, row + kTurned);
    for (int64_t i = 0; i < kTurned; ++i)
        row[i] = before[i] * cosine[i] + before[(i + kTurned / 2) % kTurned] * sine[i];
}

void agrees_with_the_formulas(int threads, bool rope, bool queries, bool int8) {
    auto hidden = normal(kBatch * kTokens * kWidth, 1), query_weight = normal(kHeads * kDim * kWidth, 2);
    auto key_weight = normal(kDim * kWidth, 3), head_weight = normal(kHeads * kWidth, 4);
    auto norm_weight = normal(kDim, 5), norm_bias = normal(kDim, 6);
    auto cosine = normal(kTokens * kTurned, 7), sine = normal(kTokens * kTurned, 8);
    std::vector<float> query(kBatch * kTokens * kHeads * kDim, NAN), weight(kBatch * kTokens * kHeads, NAN);
    std::vector<float> key(kBatch * kCapacity * kDim, NAN), scale(kBatch * kCapacity, NAN);
    std::vector<int8_t> data(kBatch * kCapacity * kDim, 99);
    dsa_index_projection_args args{};
    args.hidden = tensor(hidden, {kBatch, kTokens, kWidth}, DSA_F32);
    args.query_weight = query_weight.data();
    args.key_weight = key_weight.data();
    args.head_weight = head_weight.data();
    args.norm_weight = norm_weight.data();
    args.norm_bias = norm_bias.data();
    args.heads = kHeads;
    args.rope_batch = 1;
    if (rope) {
        args.cosine = cosine.data();
        args.sine = sine.data();
        args.rotated = kTurned;
    }
    if (queries) {
        args.query = query.data();
        args.weight = weight.data();
    }
    args.key = int8 ? tensor(data, {kBatch, kCapacity, kDim}, DSA_I8) : tensor(key, {kBatch, kCapacity, kDim}, DSA_F32);
    if (int8) args.key_scale = tensor(scale, {kBatch, kCapacity}, DSA_F32);
    args.begin = kBegin;
    args.norm_epsilon = 1e-6f;
    args.head_scale = 0.5f;
    args.threads = threads;
    CHECK(dsa_index_projection(&args) == DSA_OK);
    for (int64_t b = 0; b < kBatch; ++b) {
        for (int64_t slot : {kBegin - 1, kBegin + kTokens}) {
            CHECK(data[(b * kCapacity + slot) * kDim] == 99 && std::isnan(key[(b * kCapacity + slot) * kDim]));
            CHECK(std::isnan(scale[b * kCapacity + slot]));
        }
    }
    for (int64_t at = 0; at < kBatch * kTokens; ++at) {
        const float* row = hidden.data() + at * kWidth;
        const float* c = cosine.data() + at % kTokens * kTurned;
        const float* s = sine.data() + at % kTokens * kTurned;
        auto expected = project(row, key_weight, kDim);
        double mean = 0, variance = 0;
        for (double x : expected) mean += x / kDim;
        for (double x : expected) variance += (x - mean) * (x - mean) / kDim;
        for (int64_t i = 0; i < kDim; ++i)
            expected[i] = (expected[i] - mean) / std::sqrt(variance + 1e-6) * norm_weight[i] + norm_bias[i];
        if (rope) turn(expected.data(), c, s);
        for (int64_t i = 0; i < kDim; ++i) {
            // 24 is no power of two, so int8 keys are not rotated further.
            const int64_t slot = at / kTokens * kCapacity + kBegin + at % kTokens;
            const double got = int8 ? data[slot * kDim + i] * static_cast<double>(scale[slot]) : key[slot * kDim + i];
            CHECK(std::fabs(got - expected[i]) <= (int8 ? 0.501 * scale[slot] : 1e-4));
        }
        auto asked = project(row, query_weight, kHeads * kDim), weights = project(row, head_weight, kHeads);
        for (int64_t h = 0; h < kHeads; ++h) {
            if (rope) turn(asked.data() + h * kDim, c, s);
            CHECK(queries ? std::fabs(weight[at * kHeads + h] - 0.5 * weights[h]) <= 1e-3
                          : std::isnan(weight[at * kHeads + h]));
        }
        for (int64_t i = 0; i < kHeads * kDim; ++i) {
            const float got = query[at * kHeads * kDim + i];
            CHECK(queries ? std::fabs(got - asked[i]) <= 1e-3 : std::isnan(got));
        }
    }
}

void every_case(int threads) {
    for (int bits = 0; bits < 8; ++bits) agrees_with_the_formulas(threads, bits & 1, bits & 2, bits & 4);
}

}  // namespace

int main() { return on_every_isa(every_case); }
