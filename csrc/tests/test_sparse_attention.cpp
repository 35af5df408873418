// Attention over selected tokens and its gradients, against sums written out in double precision.
#include "dsa/sparse_attention.h"

#include "check.h"

using namespace dsa_test;

namespace {

struct Shape {
    int64_t batch, tokens, keys, heads, groups, dim, value_dim, places;
    float softcap;
    bool sink;
};

// Enough queries for blocks in step and for several groups of neighbours in one, few enough for pieces, and sizes that end
// within a vector.
const Shape kShapes[] = {
    {1, 1, 300, 4, 2, 24, 40, 277, 0.0f, false}, {2, 70, 90, 6, 2, 7, 5, 130, 0.0f, true},
    {1, 40, 64, 9, 3, 64, 64, 33, 2.0f, true},   {1, 3, 50, 5, 1, 36, 32, 20, 3.0f, false},
    {1, 2, 9, 2, 2, 1, 1, 0, 0.0f, true},        {2, 1100, 200, 3, 1, 9, 8, 100, 0.0f, false},
};

struct Problem {
    Shape n;
    std::vector<float> q, k, v, sink, grad_out;
    std::vector<int32_t> indices;

    explicit Problem(const Shape& shape) : n(shape) {
        q = normal(n.batch * n.tokens * n.heads * n.dim, 1);
        k = normal(n.batch * n.keys * n.groups * n.dim, 2);
        v = normal(n.batch * n.keys * n.groups * n.value_dim, 3);
        sink = normal(n.heads, 4);
        grad_out = normal(n.batch * n.tokens * n.heads * n.value_dim, 5);
        std::mt19937 generator(6);
        indices.resize(static_cast<size_t>(n.batch * n.tokens * n.places));
        for (auto& index : indices) index = static_cast<int32_t>(generator() % static_cast<unsigned>(n.keys + 1)) - 1;
        // The second query reads nothing.
        if (n.tokens > 1) std::fill(indices.begin() + n.places, indices.begin() + 2 * n.places, -1);
    }
};

struct Result {
    std::vector<double> out, lse, q, k, v, sink;
};

Result exact(const Problem& p) {
    const Shape& n = p.n;
    Result r{std::vector<double>(p.grad_out.size()), std::vector<double>(n.batch * n.tokens * n.heads),
             std::vector<double>(p.q.size()),        std::vector<double>(p.k.size()),
             std::vector<double>(p.v.size()),        std::vector<double>(n.heads)};
    const double scale = 1.0 / std::sqrt(static_cast<double>(n.dim));
    for (int64_t row = 0; row < n.batch * n.tokens; ++row) {
        for (int64_t h = 0; h < n.heads; ++h) {
            const int64_t g = h / (n.heads / n.groups), b = row / n.tokens, at = row * n.heads + h;
            const float *q = &p.q[at * n.dim], *grad = &p.grad_out[at * n.value_dim];
            double total = 0.0, mean = 0.0;
            std::vector<double> x(n.places), slope(n.places, 1.0), grad_weight(n.places);
            std::vector<int64_t> token(n.places);
            for (int64_t i = 0; i < n.places; ++i) {
                const int32_t index = p.indices[row * n.places + i];
                token[i] = index < 0 ? -1 : (b * n.keys + index) * n.groups + g;
                if (index < 0) continue;
                for (int64_t d = 0; d < n.dim; ++d) x[i] += scale * q[d] * p.k[token[i] * n.dim + d];
                if (n.softcap != 0.0f) {
                    const double ratio = std::tanh(x[i] / n.softcap);
                    x[i] = n.softcap * ratio;
                    slope[i] = 1.0 - ratio * ratio;
                }
                total += std::exp(x[i]);
            }
            r.lse[at] = std::log(total);
            const double sink = n.sink ? std::exp(p.sink[h]) : 0.0;
            total += sink;
            for (int64_t i = 0; i < n.places; ++i) {
                if (token[i] < 0) continue;
                const double weight = std::exp(x[i]) / total;
                for (int64_t d = 0; d < n.value_dim; ++d) {
                    const int64_t value = token[i] * n.value_dim + d;
                    r.out[at * n.value_dim + d] += weight * p.v[value];
                    r.v[value] += weight * grad[d];
                    grad_weight[i] += static_cast<double>(grad[d]) * p.v[value];
                }
                mean += weight * grad_weight[i];
            }
            for (int64_t i = 0; i < n.places; ++i) {
                if (token[i] < 0) continue;
                const double factor = std::exp(x[i]) / total * (grad_weight[i] - mean) * slope[i] * scale;
                for (int64_t d = 0; d < n.dim; ++d) {
                    r.q[at * n.dim + d] += factor * p.k[token[i] * n.dim + d];
                    r.k[token[i] * n.dim + d] += factor * q[d];
                }
            }
            if (total > 0.0) r.sink[h] -= sink / total * mean;
        }
    }
    return r;
}

void check_near(const std::vector<float>& actual, const std::vector<double>& expected) {
    double size = 1.0;
    for (double x : expected)
        if (std::isfinite(x)) size = std::max(size, std::fabs(x));
    for (size_t i = 0; i < actual.size(); ++i)
        CHECK(std::isfinite(expected[i]) ? std::fabs(actual[i] - expected[i]) <= 1e-5 * size : actual[i] == expected[i]);
}

void agrees_with_double_precision(int threads) {
    for (const Shape& n : kShapes) {
        Problem p(n);
        const Result expected = exact(p);
        const auto poisoned = [](size_t count) { return std::vector<float>(count, NAN); };
        auto out = poisoned(expected.out.size()), lse = poisoned(expected.lse.size());
        int32_t outside = 0;
        dsa_sparse_attention_args forward{};
        forward.q = tensor(p.q, {n.batch, n.tokens, n.heads, n.dim}, DSA_F32);
        forward.k = tensor(p.k, {n.batch, n.keys, n.groups, n.dim}, DSA_F32);
        forward.v = tensor(p.v, {n.batch, n.keys, n.groups, n.value_dim}, DSA_F32);
        forward.indices = tensor(p.indices, {n.batch, n.tokens, n.places}, DSA_I32);
        if (n.sink) forward.sink_logits = tensor(p.sink, {n.heads}, DSA_F32);
        forward.out = tensor(out, {n.batch, n.tokens, n.heads, n.value_dim}, DSA_F32);
        forward.lse = tensor(lse, {n.batch, n.tokens, n.heads}, DSA_F32);
        forward.outside = &outside;
        forward.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n.dim)));
        forward.softcap = n.softcap;
        forward.threads = threads;
        CHECK(dsa_sparse_attention(&forward) == DSA_OK);
        CHECK(outside == 0);
        check_near(out, expected.out);
        check_near(lse, expected.lse);

        auto q = poisoned(p.q.size()), k = poisoned(p.k.size()), v = poisoned(p.v.size()), sink = poisoned(p.sink.size());
        dsa_sparse_attention_backward_args backward{};
        backward.q = forward.q;
        backward.k = forward.k;
        backward.v = forward.v;
        backward.indices = forward.indices;
        backward.sink_logits = forward.sink_logits;
        backward.lse = forward.lse;
        backward.grad_out = tensor(p.grad_out, {n.batch, n.tokens, n.heads, n.value_dim}, DSA_F32);
        backward.grad_q = tensor(q, {n.batch, n.tokens, n.heads, n.dim}, DSA_F32);
        backward.grad_k = tensor(k, {n.batch, n.keys, n.groups, n.dim}, DSA_F32);
        backward.grad_v = tensor(v, {n.batch, n.keys, n.groups, n.value_dim}, DSA_F32);
        if (n.sink) backward.grad_sink = tensor(sink, {n.heads}, DSA_F32);
        backward.scale = forward.scale;
        backward.softcap = n.softcap;
        backward.threads = threads;
        CHECK(dsa_sparse_attention_backward(&backward) == DSA_OK);
        check_near(q, expected.q);
        check_near(k, expected.k);
        check_near(v, expected.v);
        if (n.sink) check_near(sink, expected.sink);

        if (n.places == 0) continue;
        p.indices[n.places / 2] = static_cast<int32_t>(n.keys);
        CHECK(dsa_sparse_attention(&forward) == DSA_OK);
        CHECK(outside == 1);
        p.indices[n.places / 2] = INT32_MIN;
        outside = 0;
        CHECK(dsa_sparse_attention(&forward) == DSA_OK);
        CHECK(outside == 1);
    }
}

}  // namespace

int main() { return on_every_isa(agrees_with_double_precision); }
