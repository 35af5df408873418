// The probes of the machine do the work that they claim, and read nothing outside their buffer.
#include "dsa/probe.h"

#include "check.h"

using namespace dsa_test;

static void each_kind_counts_its_work(int threads) {
    std::vector<float> buffer(3 << 18, 1.0f), sink(threads, NAN);
    for (int32_t kind : {DSA_PROBE_READ, DSA_PROBE_MULTIPLY_ADD, DSA_PROBE_INT8}) {
        for (int32_t streams : {1, 2, 3, 8}) {
            int64_t amount = -1;
            dsa_probe_args args{};
            args.buffer = tensor(buffer, {static_cast<int64_t>(buffer.size())}, DSA_F32);
            args.sink = tensor(sink, {threads}, DSA_F32);
            args.repeats = 2;
            args.amount = &amount;
            args.kind = kind;
            args.streams = streams;
            args.threads = threads;
            CHECK(dsa_probe(&args) == DSA_OK);
            CHECK(amount > 0);
            float total = 0.0f;
            for (float part : sink) total += part;
            CHECK(std::isfinite(total) && total > 0.0f);
            // Of three streams over a power of two, what is left over by whole vectors is not read.
            if (kind == DSA_PROBE_READ) CHECK(total * 4 <= amount && total * 4 >= 0.99f * amount);
        }
    }
}

int main() { return on_every_isa(each_kind_counts_its_work); }
