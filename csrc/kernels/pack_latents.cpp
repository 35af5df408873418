// Latents to FP8 rows, one pass over each. Interface: dsa/packed_latents.h.
#include "dsa/packed_latents.h"

#include "kernels/packed_row.h"

namespace dsa::DSA_ISA {
namespace {

// Rows that one item takes; fewer than two items stay on the calling thread.
constexpr int64_t kRowsPerItem = 64;

template <class T>
DSA_INLINE void widen_row(const T* p, int64_t stride, int64_t dim, float* DSA_RESTRICT row) {
    for (int64_t i = 0; i < dim; ++i) row[i] = widen(p[i * stride]);
}

}  // namespace

int pack_latents(const dsa_pack_latents_args& args) {
    const dsa_tensor &rows = args.rows, &out = args.out;
    const int64_t tokens = rows.size[1], total = rows.size[0] * tokens, dim = rows.size[2];
    const int64_t floats = round_up(dim, 16), items = ceil_div(total, kRowsPerItem);
    Scratch scratch(larger(args.threads, 1) * floats * 4);
    if (scratch.failed()) return DSA_OUT_OF_MEMORY;
    for_each_item(items, args.threads, [&](int64_t item, int worker) {
        float* x = scratch.at<float>() + worker * floats;
        const int64_t last = smaller((item + 1) * kRowsPerItem, total);
        for (int64_t row = item * kRowsPerItem; row < last; ++row) {
            const int64_t b = row / tokens, s = row % tokens, from = b * rows.stride[0] + s * rows.stride[1];
            switch (rows.dtype) {
                case DSA_F32: widen_row(static_cast<const float*>(rows.data) + from, rows.stride[2], dim, x); break;
                case DSA_BF16: widen_row(static_cast<const Bf16*>(rows.data) + from, rows.stride[2], dim, x); break;
                case DSA_F16: widen_row(static_cast<const F16*>(rows.data) + from, rows.stride[2], dim, x); break;
            }
            encode_row(x, args.latent_dim, dim - args.latent_dim, args.power_of_two != 0,
                       static_cast<uint8_t*>(out.data) + b * out.stride[0] + s * out.stride[1]);
        }
    });
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
