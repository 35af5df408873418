// Rotates, quantises and stores index keys: each is read once and written once. Interface: dsa/quantize.h.
#include "dsa/quantize.h"

#include "kernels/quantize_row.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int64_t kTokensAtATime = 256;

template <class T>
void quantize_tokens(const dsa_quantize_keys_args& args, int64_t first, int64_t last, float* row) {
    const int64_t tokens = args.keys.size[1], dim = args.keys.size[2];
    for (int64_t at = first; at < last; ++at) {
        const int64_t b = at / tokens, s = at % tokens;
        const T* key = static_cast<const T*>(args.keys.data) + b * args.keys.stride[0] + s * args.keys.stride[1];
        int8_t* data = static_cast<int8_t*>(args.data.data) + b * args.data.stride[0] + s * args.data.stride[1];
        float* scale = static_cast<float*>(args.scale.data) + b * args.scale.stride[0] + s * args.scale.stride[1];
        widen_row(key, args.keys.stride[2], dim, row);
        *scale = quantize_row(row, dim, kKeyLevels, data);
    }
}

}  // namespace

int quantize_keys(const dsa_quantize_keys_args& args) {
    const int64_t total = args.keys.size[0] * args.keys.size[1], dim = args.keys.size[2];
    const int64_t items = ceil_div(total, kTokensAtATime);
    const int64_t row_bytes = round_up(dim * 4, 64);
    const int threads = static_cast<int>(smaller<int64_t>(args.threads, items));
    Scratch scratch(row_bytes * larger(threads, 1));
    if (scratch.failed()) return DSA_OUT_OF_MEMORY;
    for_each_item(items, threads, [&](int64_t item, int worker) {
        const int64_t first = item * kTokensAtATime, last = smaller(first + kTokensAtATime, total);
        float* row = scratch.at<float>(worker * row_bytes);
        switch (args.keys.dtype) {
            case DSA_F32: return quantize_tokens<float>(args, first, last, row);
            case DSA_BF16: return quantize_tokens<Bf16>(args, first, last, row);
            case DSA_F16: return quantize_tokens<F16>(args, first, last, row);
        }
    });
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
