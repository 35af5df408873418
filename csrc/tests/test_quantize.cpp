// Index keys in eight bits, against the arithmetic written out in double precision.
#include "dsa/quantize.h"

#include "check.h"

using namespace dsa_test;

static void quantised_rows_are_near_what_they_were(int threads) {
    const int64_t batch = 2, tokens = 301, dim = 24;
    auto keys = normal(batch * tokens * dim, 1);
    for (int64_t i = 0; i < dim; ++i) keys[i] = 0.0f;
    keys[dim + 3] = NAN;
    std::vector<int8_t> data(keys.size(), 99);
    std::vector<float> scale(batch * tokens, NAN);
    dsa_quantize_keys_args args{};
    args.keys = tensor(keys, {batch, tokens, dim}, DSA_F32);
    args.data = tensor(data, {batch, tokens, dim}, DSA_I8);
    args.scale = tensor(scale, {batch, tokens}, DSA_F32);
    args.threads = threads;
    CHECK(dsa_quantize_keys(&args) == DSA_OK);
    CHECK(scale[0] == 1.0f && data[0] == 0);
    CHECK(std::isnan(scale[1]) && data[dim + 3] == 0);
    for (int64_t row = 2; row < batch * tokens; ++row)
        for (int64_t i = 0; i < dim; ++i)
            CHECK(std::fabs(data[row * dim + i] * scale[row] - keys[row * dim + i]) <= 0.5001f * scale[row]);
}

int main() { return on_every_isa(quantised_rows_are_near_what_they_were); }
