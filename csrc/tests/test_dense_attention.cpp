// Dense attention and its gradients against the formulas written out in double precision.
#include "dsa/dense_attention.h"

#include "check.h"

using namespace dsa_test;

namespace {

struct Problem {
    int64_t batch, tokens, keys, heads, groups, dim, value_dim;
    float softcap = 0.0f;
    bool window = false, sink = false;
};

struct Tensors {
    std::vector<float> q, k, v, sink, out, lse, grad_out, normaliser, mean, grad_q, grad_k, grad_v;
    std::vector<int32_t> start, end;
    dsa_dense_attention_backward_args args{};

    Tensors(const Problem& p, int threads)
        : q(normal(p.batch * p.tokens * p.heads * p.dim, 1)), k(normal(p.batch * p.keys * p.groups * p.dim, 2)),
          v(normal(p.batch * p.keys * p.groups * p.value_dim, 3)), sink(normal(p.heads, 4)),
          out(static_cast<size_t>(p.batch * p.tokens * p.heads * p.value_dim), NAN),
          lse(static_cast<size_t>(p.batch * p.tokens * p.heads), NAN), grad_out(normal(static_cast<int64_t>(out.size()), 5)),
          normaliser(lse), mean(lse), grad_q(q.size(), NAN), grad_k(k.size(), NAN), grad_v(v.size(), NAN) {
        for (int64_t b = 0; b < p.batch; ++b) {
            for (int64_t t = 0; t < p.tokens; ++t) {
                const int64_t last = std::max<int64_t>(p.keys - p.tokens + t + 1, 0);
                end.push_back(static_cast<int32_t>(last));
                start.push_back(static_cast<int32_t>(p.window ? (t % 5 == 3 ? last : std::max<int64_t>(last - 40, 0)) : 0));
            }
        }
        auto& forward = args.forward;
        forward.q = tensor(q, {p.batch, p.tokens, p.heads, p.dim}, DSA_F32);
        forward.k = tensor(k, {p.batch, p.keys, p.groups, p.dim}, DSA_F32);
        forward.v = tensor(v, {p.batch, p.keys, p.groups, p.value_dim}, DSA_F32);
        if (p.sink) forward.sink_logits = tensor(sink, {p.heads}, DSA_F32);
        if (p.window) forward.key_start = tensor(start, {p.batch, p.tokens}, DSA_I32);
        if (p.window) forward.key_end = tensor(end, {p.batch, p.tokens}, DSA_I32);
        forward.out = tensor(out, {p.batch, p.tokens, p.heads, p.value_dim}, DSA_F32);
        forward.lse = tensor(lse, {p.batch, p.tokens, p.heads}, DSA_F32);
        forward.scale = 1.0f / std::sqrt(static_cast<float>(p.dim));
        forward.softcap = p.softcap;
        forward.threads = threads;
        args.grad_out = tensor(grad_out, {p.batch, p.tokens, p.heads, p.value_dim}, DSA_F32);
        args.normaliser = tensor(normaliser, {p.batch, p.tokens, p.heads}, DSA_F32);
        args.mean = tensor(mean, {p.batch, p.tokens, p.heads}, DSA_F32);
        args.grad_q = tensor(grad_q, {p.batch, p.tokens, p.heads, p.dim}, DSA_F32);
        args.grad_k = tensor(grad_k, {p.batch, p.keys, p.groups, p.dim}, DSA_F32);
        args.grad_v = tensor(grad_v, {p.batch, p.keys, p.groups, p.value_dim}, DSA_F32);
    }
};

bool near(double actual, double expected) { return std::fabs(actual - expected) <= 2e-5 * (1 + std::fabs(expected)); }

double dot(const float* a, const float* b, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(a[i]) * b[i];
    return sum;
}

void check(const Problem& p, int threads) {
    Tensors x(p, threads);
    CHECK(dsa_dense_attention(&x.args.forward) == DSA_OK);
    std::vector<double> grad_q(x.q.size()), grad_k(x.k.size()), grad_v(x.v.size());
    const double scale = x.args.forward.scale;
    bool forward = true;
    for (int64_t row = 0; row < p.batch * p.tokens * p.heads; ++row) {
        const int64_t head = row % p.heads, at = row / p.heads, b = at / p.tokens, group = head / (p.heads / p.groups);
        const int64_t first = x.start[at], last = x.end[at];
        const float* q = x.q.data() + row * p.dim;
        const auto key = [&](int64_t s) { return (b * p.keys + s) * p.groups + group; };
        std::vector<double> weights, slopes;
        double total = 0;
        for (int64_t s = first; s < last; ++s) {
            double score = scale * dot(q, x.k.data() + key(s) * p.dim, p.dim), slope = 1;
            if (p.softcap != 0) {
                const double capped = std::tanh(score / p.softcap);
                score = p.softcap * capped;
                slope = 1 - capped * capped;
            }
            weights.push_back(std::exp(score));
            slopes.push_back(slope);
            total += weights.back();
        }
        forward &= total == 0 ? x.lse[row] == -INFINITY : near(x.lse[row], std::log(total));
        if (p.sink) total += std::exp(static_cast<double>(x.sink[head]));
        x.normaliser[row] = static_cast<float>(std::log(total));
        const float *out = x.out.data() + row * p.value_dim, *grad = x.grad_out.data() + row * p.value_dim;
        std::vector<double> mixed(static_cast<size_t>(p.value_dim));
        double mean = 0;
        for (int64_t s = first; s < last; ++s) {
            const float* value = x.v.data() + key(s) * p.value_dim;
            weights[s - first] /= total;
            for (int64_t c = 0; c < p.value_dim; ++c) mixed[c] += weights[s - first] * value[c];
            mean += weights[s - first] * dot(grad, value, p.value_dim);
        }
        for (int64_t c = 0; c < p.value_dim; ++c) forward &= near(out[c], mixed[c]);
        for (int64_t s = first; s < last; ++s) {
            const double weight = weights[s - first];
            const double product = dot(grad, x.v.data() + key(s) * p.value_dim, p.value_dim);
            const double change = weight * (product - mean) * slopes[s - first] * scale;
            for (int64_t c = 0; c < p.value_dim; ++c) grad_v[key(s) * p.value_dim + c] += weight * grad[c];
            for (int64_t c = 0; c < p.dim; ++c) grad_q[row * p.dim + c] += change * x.k[key(s) * p.dim + c];
            for (int64_t c = 0; c < p.dim; ++c) grad_k[key(s) * p.dim + c] += change * q[c];
        }
    }
    CHECK(forward);
    CHECK(dsa_dense_attention_backward(&x.args) == DSA_OK);
    bool backward = true;
    for (size_t i = 0; i < grad_q.size(); ++i) backward &= near(x.grad_q[i], grad_q[i]);
    for (size_t i = 0; i < grad_k.size(); ++i) backward &= near(x.grad_k[i], grad_k[i]);
    for (size_t i = 0; i < grad_v.size(); ++i) backward &= near(x.grad_v[i], grad_v[i]);
    CHECK(backward);
}

void unseen_keys_do_not_matter(int threads) {
    // Every query but the last sees the first 40 keys; key 40 is not a number.
    const Problem p{1, 30, 50, 4, 2, 16, 16, 0.0f, true, false};
    Tensors clean(p, threads), dirty(p, threads);
    for (auto* x : {&clean, &dirty}) {
        for (int64_t t = 0; t < p.tokens; ++t) {
            x->start[t] = 0;
            x->end[t] = t + 1 < p.tokens ? 40 : 41;
        }
    }
    for (int64_t i = 40 * p.groups * p.dim; i < 41 * p.groups * p.dim; ++i) dirty.k[i] = dirty.v[i] = NAN;
    for (auto* x : {&clean, &dirty}) {
        CHECK(dsa_dense_attention(&x->args.forward) == DSA_OK);
        x->normaliser = x->lse;
        x->args.normaliser.data = x->normaliser.data();
        CHECK(dsa_dense_attention_backward(&x->args) == DSA_OK);
    }
    const int64_t others = (p.tokens - 1) * p.heads * p.dim;
    bool same = true, poisoned = true;
    for (int64_t i = 0; i < p.tokens * p.heads * p.dim; ++i) {
        if (i < others)
            same &= near(dirty.out[i], clean.out[i]) && near(dirty.grad_q[i], clean.grad_q[i]);
        else
            poisoned &= std::isnan(dirty.out[i]) && std::isnan(dirty.grad_q[i]);
    }
    CHECK(same);
    CHECK(poisoned);
}

void agrees_with_double_precision(int threads) {
    check({2, 37, 37, 6, 3, 8, 8}, threads);
    check({1, 150, 170, 6, 2, 32, 24}, threads);
    check({1, 20, 9, 2, 1, 7, 5}, threads);
    check({1, 61, 90, 4, 2, 16, 16, 1.5f, true, true}, threads);
    check({2, 1, 1500, 6, 2, 32, 32}, threads);           // one query, chunks of keys
    check({1, 1, 1100, 9, 3, 16, 32, 2.0f, false, true}, threads);
    check({1, 1, 1201, 33, 1, 16, 16}, threads);          // one query, a tile of its heads
    check({1, 3, 1300, 3, 1, 20, 16, 0.0f, true}, threads);
    check({1, 3, 0, 2, 1, 8, 8}, threads);
    unseen_keys_do_not_matter(threads);
}

}  // namespace

int main() { return on_every_isa(agrees_with_double_precision); }
