// The indexer's loss and its gradients, against the formulas in double precision: several chunks of keys, queries that
// see different ranges, and what nobody sees poisoned.
#include "dsa/indexer_loss.h"

#include <algorithm>

#include "check.h"

using namespace dsa_test;

namespace {

constexpr int64_t kTokens = 37, kKeys = 700, kHeads = 6, kGroups = 2, kDim = 10, kIndexHeads = 3, kIndexDim = 12;
constexpr int64_t kSelected = 90, kSinks = 2, kLocal = 30;

struct Problem {
    std::vector<float> q = normal(kTokens * kHeads * kDim, 1), k = normal(kKeys * kGroups * kDim, 2);
    std::vector<float> qi = normal(kTokens * kIndexHeads * kIndexDim, 3), ki = normal(kKeys * kIndexDim, 4);
    std::vector<float> w = normal(kTokens * kIndexHeads, 5);
    std::vector<int32_t> start, end, indices;
    Problem() {
        for (int64_t t = 0; t < kTokens; ++t) {
            start.push_back(static_cast<int32_t>(t % 3 * 50));
            end.push_back(static_cast<int32_t>(t % 5 == 4 ? start.back() : 100 + (t * 173) % 580));
            for (int64_t i = 0; i < kSelected; ++i)
                indices.push_back(i % 7 == 0 ? -1 : static_cast<int32_t>((i * 31 + t * 7) % kKeys));
        }
        const int64_t seen = *std::max_element(end.begin(), end.end());
        for (int64_t i = seen * kGroups * kDim; i < kKeys * kGroups * kDim; ++i) k[i] = NAN;
        for (int64_t i = seen * kIndexDim; i < kKeys * kIndexDim; ++i) ki[i] = NAN;
    }
};

struct Result {
    double loss = 0;
    std::vector<double> q = std::vector<double>(kTokens * kIndexHeads * kIndexDim);
    std::vector<double> k = std::vector<double>(kKeys * kIndexDim);
    std::vector<double> w = std::vector<double>(kTokens * kIndexHeads);
};

Result expected(const Problem& p, bool selected) {
    Result result;
    int64_t count = 0;
    const double scale = 1 / std::sqrt(double(kDim)), index_scale = 1 / std::sqrt(double(kIndexDim));
    for (int64_t t = 0; t < kTokens; ++t) {
        std::vector<int64_t> read;
        for (int64_t i = 0; i < (selected ? kSelected : kKeys); ++i) {
            const int64_t s = selected ? p.indices[t * kSelected + i] : i;
            if (s >= p.start[t] && s < p.end[t]) read.push_back(s);
        }
        auto kept = [&](int64_t s) { return s >= p.start[t] + kSinks && s < p.end[t] - kLocal; };
        if (std::none_of(read.begin(), read.end(), kept)) continue;
        ++count;
        std::vector<double> target(read.size()), score(read.size());
        for (int64_t h = 0; h < kHeads; ++h) {
            std::vector<double> weight;
            double sum = 0;
            for (int64_t s : read) {
                double dot = 0;
                for (int64_t d = 0; d < kDim; ++d)
                    dot += double(p.q[(t * kHeads + h) * kDim + d]) *
                           p.k[(s * kGroups + h / (kHeads / kGroups)) * kDim + d];
                weight.push_back(std::exp(dot * scale));
                sum += weight.back();
            }
            for (size_t i = 0; i < read.size(); ++i) target[i] += kept(read[i]) ? weight[i] / sum : 0;
        }
        double mass = 0, sum = 0;
        for (size_t i = 0; i < read.size(); ++i) {
            mass += target[i];
            for (int64_t j = 0; j < kIndexHeads; ++j) {
                double dot = 0;
                for (int64_t d = 0; d < kIndexDim; ++d)
                    dot += double(p.qi[(t * kIndexHeads + j) * kIndexDim + d]) * p.ki[read[i] * kIndexDim + d];
                score[i] += index_scale * p.w[t * kIndexHeads + j] * std::max(dot, 0.0);
            }
            if (kept(read[i])) sum += std::exp(score[i]);
        }
        for (size_t i = 0; i < read.size(); ++i) {
            const int64_t s = read[i];
            if (!kept(s)) continue;
            const double aim = target[i] / mass, predicted = score[i] - std::log(sum);
            result.loss += aim * (std::log(aim) - predicted);
            const double grad = std::exp(predicted) - aim;
            for (int64_t j = 0; j < kIndexHeads; ++j) {
                const int64_t row = t * kIndexHeads + j;
                double dot = 0;
                for (int64_t d = 0; d < kIndexDim; ++d)
                    dot += double(p.qi[row * kIndexDim + d]) * p.ki[s * kIndexDim + d];
                if (dot <= 0) continue;
                result.w[row] += index_scale * grad * dot;
                for (int64_t d = 0; d < kIndexDim; ++d) {
                    result.q[row * kIndexDim + d] += index_scale * p.w[row] * grad * p.ki[s * kIndexDim + d];
                    result.k[s * kIndexDim + d] += index_scale * p.w[row] * grad * p.qi[row * kIndexDim + d];
                }
            }
        }
    }
    result.loss /= double(count);
    for (auto* grad : {&result.q, &result.k, &result.w})
        for (double& value : *grad) value /= double(count);
    return result;
}

bool near(const std::vector<float>& actual, const std::vector<double>& wanted) {
    double largest = 0, error = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
        largest = std::max(largest, std::fabs(wanted[i]));
        if (!(std::fabs(actual[i] - wanted[i]) <= error)) error = std::fabs(actual[i] - wanted[i]);
    }
    return error <= 2e-5 * largest;
}

void agrees(int threads) {
    Problem p;
    for (bool selected : {false, true}) {
        const Result wanted = expected(p, selected);
        std::vector<float> loss(1, NAN), grad_q(p.qi.size(), NAN), grad_k(p.ki.size(), NAN), grad_w(p.w.size(), NAN);
        dsa_indexer_loss_args args{};
        args.q_index = tensor(p.qi, {1, kTokens, kIndexHeads, kIndexDim}, DSA_F32);
        args.k_index = tensor(p.ki, {1, kKeys, kIndexDim}, DSA_F32);
        args.w_index = tensor(p.w, {1, kTokens, kIndexHeads}, DSA_F32);
        args.q = tensor(p.q, {1, kTokens, kHeads, kDim}, DSA_F32);
        args.k = tensor(p.k, {1, kKeys, kGroups, kDim}, DSA_F32);
        if (selected) args.indices = tensor(p.indices, {1, kTokens, kSelected}, DSA_I32);
        args.key_start = tensor(p.start, {1, kTokens}, DSA_I32);
        args.key_end = tensor(p.end, {1, kTokens}, DSA_I32);
        args.loss = tensor(loss, {1}, DSA_F32);
        args.grad_q = tensor(grad_q, {1, kTokens, kIndexHeads, kIndexDim}, DSA_F32);
        args.grad_k = tensor(grad_k, {1, kKeys, kIndexDim}, DSA_F32);
        args.grad_w = tensor(grad_w, {1, kTokens, kIndexHeads}, DSA_F32);
        args.sinks = kSinks;
        args.local = kLocal;
        args.index_scale = 1 / std::sqrt(float(kIndexDim));
        args.attention_scale = 1 / std::sqrt(float(kDim));
        args.threads = threads;
        CHECK(dsa_indexer_loss(&args) == DSA_OK);
        CHECK(std::fabs(loss[0] - wanted.loss) <= 1e-5 * wanted.loss);
        CHECK(near(grad_q, wanted.q));
        CHECK(near(grad_k, wanted.k));
        CHECK(near(grad_w, wanted.w));
    }
}

}  // namespace

int main() { return on_every_isa(agrees); }
