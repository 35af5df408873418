// FP8 rows of latent attention: what is written, against the nearest numbers found by search, and attention over them,
// against sums written out in double precision.
#include "dsa/packed_latents.h"

#include <algorithm>

#include "check.h"

using namespace dsa_test;

namespace {

struct Shape {
    int64_t batch, tokens, keys, heads, latent_dim, rope_dim, places;
    float softcap;
    bool sink;
};

// Few queries for pieces, many for none, groups that end early and sizes that end within a vector.
const Shape kShapes[] = {
    {1, 1, 300, 5, 512, 64, 277, 0.0f, false}, {2, 40, 90, 3, 20, 8, 33, 2.0f, true}, {1, 3, 50, 1, 131, 3, 20, 0.0f, true},
    {1, 2, 9, 2, 8, 0, 0, 0.0f, true},
};

int64_t row_bytes(const Shape& n) { return n.latent_dim + 4 * ((n.latent_dim + 127) / 128) + 2 * n.rope_dim; }

double e4m3(uint8_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const double size = exponent == 0 ? mantissa * std::ldexp(1.0, -9) : (1.0 + mantissa / 8.0) * std::ldexp(1.0, exponent - 7);
    if (exponent == 15 && mantissa == 7) return NAN;
    return code & 0x80 ? -size : size;
}

double number(const int8_t* row, const Shape& n, int64_t i) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(row);
    if (i < n.latent_dim) {
        float scale;
        std::memcpy(&scale, bytes + n.latent_dim + 4 * (i / 128), 4);
        return e4m3(bytes[i]) * scale;
    }
    uint16_t half;
    std::memcpy(&half, bytes + row_bytes(n) - 2 * n.rope_dim + 2 * (i - n.latent_dim), 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The code of the number nearest to x, the even one of two.
uint8_t nearest(double x) {
    int best = 0;
    for (int code = 1; code < 0x7f; ++code) {
        const double now = std::fabs(e4m3(static_cast<uint8_t>(code)) - std::fabs(x));
        const double before = std::fabs(e4m3(static_cast<uint8_t>(best)) - std::fabs(x));
        if (now < before || (now == before && code % 2 == 0)) best = code;
    }
    return static_cast<uint8_t>(best | (std::signbit(x) ? 0x80 : 0));
}

std::vector<int8_t> packed(const Shape& n, std::vector<float>& x, int threads, bool power_of_two) {
    std::vector<int8_t> rows(static_cast<size_t>(n.batch * n.keys * row_bytes(n)), 0x55);
    dsa_pack_latents_args args{};
    args.rows = tensor(x, {n.batch, n.keys, n.latent_dim + n.rope_dim}, DSA_F32);
    args.out = tensor(rows, {n.batch, n.keys, row_bytes(n)}, DSA_I8);
    args.latent_dim = static_cast<int32_t>(n.latent_dim);
    args.power_of_two = power_of_two;
    args.threads = threads;
    CHECK(dsa_pack_latents(&args) == DSA_OK);
    return rows;
}

void writes_the_nearest_numbers(int threads) {
    for (const Shape& n : kShapes) {
        const int64_t dim = n.latent_dim + n.rope_dim;
        auto x = normal(n.batch * n.keys * dim, 3);
        for (int64_t i = 0; i < dim; ++i) x[i] = 0.0f;                       // a row of zeros
        for (int64_t i = 0; i < dim; ++i) x[dim + i] *= i % 3 ? 1e-3f : 1.0f;  // subnormal numbers
        for (bool power_of_two : {false, true}) {
            const auto rows = packed(n, x, threads, power_of_two);
            for (int64_t row = 0; row < n.batch * n.keys; ++row) {
                const auto* bytes = reinterpret_cast<const uint8_t*>(&rows[row * row_bytes(n)]);
                for (int64_t first = 0; first < n.latent_dim; first += 128) {
                    const int64_t end = std::min(first + 128, n.latent_dim);
                    float largest = 0.0f, scale;
                    for (int64_t i = first; i < end; ++i) largest = std::max(largest, std::fabs(x[row * dim + i]));
                    float expected = largest == 0.0f ? 1.0f : largest / 448.0f;
                    if (power_of_two) expected = static_cast<float>(std::exp2(std::ceil(std::log2(static_cast<double>(expected)))));
                    std::memcpy(&scale, bytes + n.latent_dim + 4 * (first / 128), 4);
                    CHECK(scale == expected);
                    for (int64_t i = first; i < end; ++i) CHECK(bytes[i] == nearest(x[row * dim + i] / expected));
                }
                for (int64_t i = n.latent_dim; i < dim; ++i)
                    CHECK(std::fabs(number(&rows[row * row_bytes(n)], n, i) - x[row * dim + i]) <= std::fabs(x[row * dim + i]) / 256);
            }
        }
    }
    // What is not finite makes its group NaN.
    const Shape n{1, 1, 1, 1, 256, 0, 1, 0.0f, false};
    std::vector<float> x(256, 1.0f);
    x[200] = INFINITY;
    const auto rows = packed(n, x, threads, false);
    CHECK(std::fabs(number(rows.data(), n, 0) - 1.0) < 1e-6);
    for (int64_t i = 128; i < 256; ++i) CHECK(std::isnan(number(rows.data(), n, i)));
}

void agrees_with_double_precision(int threads) {
    for (const Shape& n : kShapes) {
        const int64_t dim = n.latent_dim + n.rope_dim;
        auto x = normal(n.batch * n.keys * dim, 1), q = normal(n.batch * n.tokens * n.heads * dim, 2);
        auto sink = normal(n.heads, 4);
        auto rows = packed(n, x, threads, false);
        std::vector<int32_t> indices(static_cast<size_t>(n.batch * n.tokens * n.places));
        std::mt19937 generator(6);
        for (auto& index : indices) index = static_cast<int32_t>(generator() % static_cast<unsigned>(n.keys + 1)) - 1;
        // The second query reads nothing.
        if (n.tokens > 1) std::fill(indices.begin() + n.places, indices.begin() + 2 * n.places, -1);
        std::vector<float> out(static_cast<size_t>(n.batch * n.tokens * n.heads * n.latent_dim), NAN);
        std::vector<float> lse(static_cast<size_t>(n.batch * n.tokens * n.heads), NAN);
        int32_t outside = 0;
        dsa_packed_attention_args args{};
        args.q = tensor(q, {n.batch, n.tokens, n.heads, dim}, DSA_F32);
        args.rows = tensor(rows, {n.batch, n.keys, row_bytes(n)}, DSA_I8);
        args.indices = tensor(indices, {n.batch, n.tokens, n.places}, DSA_I32);
        if (n.sink) args.sink_logits = tensor(sink, {n.heads}, DSA_F32);
        args.out = tensor(out, {n.batch, n.tokens, n.heads, n.latent_dim}, DSA_F32);
        args.lse = tensor(lse, {n.batch, n.tokens, n.heads}, DSA_F32);
        args.outside = &outside;
        args.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
        args.softcap = n.softcap;
        args.latent_dim = static_cast<int32_t>(n.latent_dim);
        args.threads = threads;
        CHECK(dsa_packed_attention(&args) == DSA_OK);
        CHECK(outside == 0);
        for (int64_t at = 0; at < n.batch * n.tokens * n.heads; ++at) {
            const int64_t query = at / n.heads, b = query / n.tokens;
            double total = 0.0;
            std::vector<double> mixed(n.latent_dim, 0.0);
            for (int64_t i = 0; i < n.places; ++i) {
                const int32_t index = indices[query * n.places + i];
                if (index < 0) continue;
                const int8_t* row = &rows[(b * n.keys + index) * row_bytes(n)];
                double score = 0.0;
                for (int64_t d = 0; d < dim; ++d) score += static_cast<double>(args.scale) * q[at * dim + d] * number(row, n, d);
                if (n.softcap != 0.0f) score = n.softcap * std::tanh(score / n.softcap);
                total += std::exp(score);
                for (int64_t d = 0; d < n.latent_dim; ++d) mixed[d] += std::exp(score) * number(row, n, d);
            }
            const double log_total = std::log(total);
            CHECK(std::isfinite(log_total) ? std::fabs(lse[at] - log_total) <= 1e-5 * std::max(1.0, std::fabs(log_total))
                                           : lse[at] == log_total);
            total += n.sink ? std::exp(static_cast<double>(sink[at % n.heads])) : 0.0;
            for (int64_t d = 0; d < n.latent_dim; ++d)
                CHECK(std::fabs(out[at * n.latent_dim + d] - (total > 0.0 ? mixed[d] / total : 0.0)) <= 2e-5);
        }
        if (n.places == 0) continue;
        for (int32_t wrong : {static_cast<int32_t>(n.keys), INT32_MIN}) {
            indices[n.places / 2] = wrong;
            outside = 0;
            CHECK(dsa_packed_attention(&args) == DSA_OK);
            CHECK(outside == 1);
        }
    }
}

}  // namespace

int main() {
    return on_every_isa([](int threads) {
        writes_the_nearest_numbers(threads);
        agrees_with_double_precision(threads);
    });
}
