// Index queries, head weights and keys of a few tokens. Interface: dsa/index_projection.h.
//
// While a model decodes, the weights come from memory: 0.4 MB a layer that is read once. So a row of weights meets all
// tokens at once, rows are shared out to the threads, and what follows the projections, a few hundred numbers, is
// done by the caller's thread.
#include "dsa/index_projection.h"

#include "kernels/quantize_row.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int kRows = 4;
constexpr int64_t kRowsAtATime = 16;
// Below this a second thread costs more than it reads.
constexpr int64_t kBytesForThreads = 128 << 10;

// The products of `hidden` with rows of a matrix: sums run through the lanes in the order of the dims, so they depend
// on the vectors' width and nothing else.
template <int count>
DSA_INLINE void dot_rows(const float* hidden, const float* const* rows, int64_t dim, float* out) {
    F32 sums[count];
    for (int r = 0; r < count; ++r) sums[r] = zero();
    int64_t at = 0;
    for (; at + kWidth <= dim; at += kWidth) {
        const F32 h = load(hidden + at);
        for (int r = 0; r < count; ++r) {
            __builtin_prefetch(rows[r] + at + count * dim);
            sums[r] = fma(h, load(rows[r] + at), sums[r]);
        }
    }
    if (at < dim) {
        const F32 h = load_partial(hidden + at, dim - at);
        for (int r = 0; r < count; ++r) sums[r] = fma(h, load_partial(rows[r] + at, dim - at), sums[r]);
    }
    for (int r = 0; r < count; ++r) out[r] = reduce_add(sums[r]);
}

// LayerNorm of one key, in fp32 with the sums in double precision.
void normalise(float* row, int64_t dim, const float* weight, const float* bias, float epsilon) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < dim; ++i) sum += static_cast<double>(row[i]);
    const double mean = sum / static_cast<double>(dim);
    for (int64_t i = 0; i < dim; ++i) {
        const double away = static_cast<double>(row[i]) - mean;
        squares += away * away;
    }
    const double variance = squares / static_cast<double>(dim);
    const float middle = static_cast<float>(mean);
    const float inverse = static_cast<float>(1.0 / sqrt(variance + static_cast<double>(epsilon)));
    for (int64_t i = 0; i < dim; ++i) row[i] = (row[i] - middle) * inverse * weight[i] + bias[i];
}

// RoPE on the first dims: `i` and `i + dims / 2` are a pair.
void turn(float* DSA_RESTRICT row, const float* cosine, const float* sine, int64_t dims) {
    const int64_t half = dims / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float first = row[i], second = row[i + half];
        row[i] = first * cosine[i] + second * sine[i];
        row[i + half] = second * cosine[i + half] + first * sine[i + half];
    }
}

}  // namespace

int index_projection(const dsa_index_projection_args& args) {
    const int64_t batch = args.hidden.size[0], tokens = args.hidden.size[1], width = args.hidden.size[2];
    const int64_t dim = args.key.size[2], heads = args.query != nullptr ? args.heads : 0, query_rows = heads * dim;
    const int64_t rows = dim + query_rows + heads, total = batch * tokens;

    // Of each token: the key's projections, then the queries' and the head weights'.
    Scratch scratch(total * rows * 4);
    if (scratch.failed()) return DSA_OUT_OF_MEMORY;
    float* projected = scratch.at<float>();
    const auto weight_row = [&](int64_t row) {
        if (row < dim) return args.key_weight + row * width;
        row -= dim;
        return row < query_rows ? args.query_weight + row * width : args.head_weight + (row - query_rows) * width;
    };
    const int64_t items = ceil_div(rows, kRowsAtATime);
    const int threads = rows * width * 4 < kBytesForThreads ? 1 : static_cast<int>(smaller<int64_t>(args.threads, items));
    for_each_item(items, threads, [&](int64_t item, int) {
        const int64_t last = smaller((item + 1) * kRowsAtATime, rows);
        for (int64_t row = item * kRowsAtATime; row < last; row += kRows) {
            const int64_t count = smaller<int64_t>(kRows, last - row);
            const float* weights[kRows];
            for (int64_t r = 0; r < count; ++r) weights[r] = weight_row(row + r);
            for (int64_t at = 0; at < total; ++at) {
                const float* hidden = static_cast<const float*>(args.hidden.data) +
                                      at / tokens * args.hidden.stride[0] + at % tokens * args.hidden.stride[1];
                float* out = projected + at * rows + row;
                if (count == kRows) {
                    dot_rows<kRows>(hidden, weights, width, out);
                } else {
                    for (int64_t r = 0; r < count; ++r) dot_rows<1>(hidden, weights + r, width, out + r);
                }
            }
        }
    });

    for (int64_t at = 0; at < total; ++at) {
        const int64_t b = at / tokens, t = at % tokens;
        const int64_t angles = ((args.rope_batch > 1 ? b * tokens : 0) + t) * args.rotated;
        const float *cosine = args.cosine + angles, *sine = args.sine + angles;
        float* key = projected + at * rows;
        normalise(key, dim, args.norm_weight, args.norm_bias, args.norm_epsilon);
        turn(key, cosine, sine, args.rotated);
        const int64_t slot = args.begin + t, place = b * args.key.stride[0] + slot * args.key.stride[1];
        if (args.key.dtype == DSA_I8) {
            const int64_t scale_place = b * args.key_scale.stride[0] + slot * args.key_scale.stride[1];
            static_cast<float*>(args.key_scale.data)[scale_place] =
                quantize_row(key, dim, kKeyLevels, static_cast<int8_t*>(args.key.data) + place);
        } else {
            memcpy(static_cast<float*>(args.key.data) + place, key, static_cast<size_t>(dim) * 4);
        }
        if (args.query == nullptr) continue;
        float* query = args.query + at * query_rows;
        memcpy(query, key + dim, static_cast<size_t>(query_rows) * 4);
        for (int64_t first = 0; first < query_rows; first += dim) turn(query + first, cosine, sine, args.rotated);
        const float* weight = key + dim + query_rows;
        for (int64_t h = 0; h < heads; ++h) args.weight[at * heads + h] = weight[h] * args.head_scale;
    }
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
