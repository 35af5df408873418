// Products of activations in eight bits with weights in blocks. Interface: dsa/packed_linear.h.
//
// Activations are quantised once for a chunk of tokens, and every panel of weights then meets all of them, so weights
// come from memory once for each chunk and once for a token. Sums of a block are integers; blocks are added in the order
// of the columns, for every number of tokens in the same way, so a result depends on the instruction set and on nothing
// else.
#include "dsa/packed_linear.h"

#include "kernels/packed_linear_format.h"
#include "kernels/packed_linear_lanes.h"

namespace dsa::DSA_ISA {
namespace {

// 32 columns of one token.
struct Group {
    int8_t quants[kBlockColumns];
    float scale;
    float scaled_sum;  // The scale times the sum of the quants.
    int32_t sums[2];   // Of the quants, by halves.
};

constexpr int kVectors = kPanelRows / kWidth;
// Tokens whose sums stay in registers.
constexpr int kTile = kWidth == 16 ? 16 : 4;
constexpr int64_t kChunkBytes = 384 << 10;
// Below this a second thread costs more than it reads.
constexpr int64_t kWorkForThreads = 64 << 10;
constexpr int64_t kTokensAtATime = 8;
constexpr float kLevels = 127.0f;
constexpr float kSmallest = 0x1p-100f;

static_assert(kBlockColumns % kWidth == 0, "a group is whole vectors");

void quantize_group(const float* x, Group* out) {
    F32 highest = zero(), spoilt = zero();
    for (int i = 0; i < kBlockColumns; i += kWidth) {
        const F32 a = load(x + i);
        highest = max(highest, max(a, zero() - a));
        spoilt += a * zero();
    }
    const float largest = reduce_max(highest), nan = reduce_add(spoilt);
    const bool usable = nan == 0.0f && largest >= kSmallest;
    const F32 inverse = broadcast(usable ? kLevels / largest : 0.0f);
    float whole[kBlockColumns];
    // What is not finite is multiplied by zero, and must not be converted.
    for (int i = 0; i < kBlockColumns; i += kWidth)
        store(whole + i, usable ? round_even(load(x + i) * inverse) : zero());
    int32_t sums[2] = {0, 0};
    for (int i = 0; i < kBlockColumns; ++i) {
        const int32_t quant = static_cast<int32_t>(whole[i]);
        out->quants[i] = static_cast<int8_t>(quant);
        sums[i / (kBlockColumns / 2)] += quant;
    }
    out->scale = usable ? largest / kLevels : nan;
    out->scaled_sum = out->scale * static_cast<float>(sums[0] + sums[1]);
    out->sums[0] = sums[0];
    out->sums[1] = sums[1];
}

template <class T>
void quantize_row_of(const T* row, int64_t columns, Group* out) {
    float x[kBlockColumns];
    for (int64_t at = 0; at < columns; at += kBlockColumns, ++out) {
        const int64_t count = smaller<int64_t>(kBlockColumns, columns - at);
        for (int64_t i = 0; i < count; ++i) x[i] = widen(row[at + i]);
        for (int64_t i = count; i < kBlockColumns; ++i) x[i] = 0.0f;
        quantize_group(x, out);
    }
}

void quantize_token(const dsa_tensor& input, int64_t token, Group* out) {
    const int64_t at = token * input.stride[0], columns = input.size[1];
    switch (input.dtype) {
        case DSA_F32: return quantize_row_of(static_cast<const float*>(input.data) + at, columns, out);
        case DSA_BF16: return quantize_row_of(static_cast<const Bf16*>(input.data) + at, columns, out);
        case DSA_F16: return quantize_row_of(static_cast<const F16*>(input.data) + at, columns, out);
    }
}

// The eight words of a block for the lanes of one vector.
template <class F>
DSA_INLINE void unpack(const uint8_t* block, Bytes* words) {
    if (F::kBits == 8) {
#pragma GCC unroll 8
        for (int w = 0; w < kWords; ++w) {
            words[w] = load_bytes(block + w * kWordBytes);
            if (!kUnsignedBytes) words[w] = without_offset(words[w]);
        }
        return;
    }
#pragma GCC unroll 4
    for (int w = 0; w < kWords / 2; ++w) {
        const Bytes both = load_bytes(block + w * kWordBytes);
        words[w] = shifted<0>(both, 0x0f);
        words[w + kWords / 2] = shifted<-4>(both, 0x0f);
    }
    if (F::kBits == 5) {
        const Bytes high = load_bytes(block + F::kHighAt);
        words[0] = words[0] | shifted<4>(high, 0x10);
        words[1] = words[1] | shifted<3>(high, 0x10);
        words[2] = words[2] | shifted<2>(high, 0x10);
        words[3] = words[3] | shifted<1>(high, 0x10);
        words[4] = words[4] | shifted<0>(high, 0x10);
        words[5] = words[5] | shifted<-1>(high, 0x10);
        words[6] = words[6] | shifted<-2>(high, 0x10);
        words[7] = words[7] | shifted<-3>(high, 0x10);
    }
    if (F::kBits == 6) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const Bytes high = load_bytes(block + F::kHighAt + half * kWordBytes);
            Bytes* four = words + half * kWords / 2;
            four[0] = four[0] | shifted<4>(high, 0x30);
            four[1] = four[1] | shifted<2>(high, 0x30);
            four[2] = four[2] | shifted<0>(high, 0x30);
            four[3] = four[3] | shifted<-2>(high, 0x30);
        }
    }
}

// Scales and minima of a block's rows.
template <class F>
struct Scales {
    // The heads are zero until the first super block, which not every compiler sees is the first block.
    F32 super_scale = zero(), super_minimum = zero(), scale[F::kParts], minimum;

    DSA_INLINE void head(const uint8_t* head, int lane) {
        const F16* halves = reinterpret_cast<const F16*>(head);
        super_scale = load(halves + lane);
        if (F::kMinimum) super_minimum = load(halves + kPanelRows + lane);
    }

    DSA_INLINE void block(const uint8_t* block, int lane) {
        for (int part = 0; part < F::kParts; ++part) {
            const uint8_t* at = block + F::kScaleAt + (part * kPanelRows + lane) * F::kScaleBytes;
            if (!F::kSuper)
                scale[part] = load(reinterpret_cast<const F16*>(at));
            else
                scale[part] = super_scale * (F::kMinimum ? load_unsigned(at) : load_signed(at));
        }
        if (!F::kMinimum) return;
        const uint8_t* at = block + F::kMinimumAt + lane * F::kScaleBytes;
        if (F::kSuper)
            minimum = zero() - super_minimum * load_unsigned(at);
        else
            minimum = load(reinterpret_cast<const F16*>(at));
    }
};

// `kWidth` rows of a panel, from `lane` on, with `count` tokens.
template <class F, int count>
void multiply(const uint8_t* at, int lane, const Group* tokens, int64_t blocks, F32* out) {
    constexpr int words = kWords / F::kParts;
    constexpr int offset = F::kBits == 8 && !kUnsignedBytes ? 0 : F::kZero;
    F32 sums[count];
#pragma GCC unroll 16
    for (int t = 0; t < count; ++t) sums[t] = zero();
    Scales<F> scales;
    for (int64_t b = 0; b < blocks; ++b) {
        if (F::kSuper && b % kSuperBlocks == 0) {
            scales.head(at, lane);
            at += F::kHeadBytes;
        }
        if (count == 1)
            for (int line = 0; line < F::kBlockBytes; line += 64) __builtin_prefetch(at + 4 * F::kBlockBytes + line);
        Bytes weights[kWords];
        unpack<F>(at + lane * 4, weights);
        scales.block(at, lane);
        at += F::kBlockBytes;
#pragma GCC unroll 16
        for (int t = 0; t < count; ++t) {
            const Group& group = tokens[t * blocks + b];
            const int32_t* activations = reinterpret_cast<const int32_t*>(group.quants);
            for (int part = 0; part < F::kParts; ++part) {
                const int32_t sum = F::kParts == 1 ? group.sums[0] + group.sums[1] : group.sums[part];
                const Sum whole = dot_words<F::kBits, words>(weights + part * words, activations + part * words,
                                                             start(offset == 0 ? 0 : -offset * sum));
                sums[t] = fma(to_float(whole), scales.scale[part] * broadcast(group.scale), sums[t]);
            }
            if (F::kMinimum) sums[t] = fma(scales.minimum, broadcast(group.scaled_sum), sums[t]);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < count; ++t) out[t] = sums[t];
}

// One panel with the tokens of a chunk, `first` being the first one's place in the output.
template <class F>
void multiply_panel(const dsa_packed_linear_args& args, int64_t panel, const Group* tokens, int64_t first, int64_t count,
                    int64_t blocks) {
    const uint8_t* data = args.panels + panel * F::panel_bytes(blocks);
    for (int lane = 0; lane < kPanelRows; lane += kWidth) {
        const int64_t row = panel * kPanelRows + lane, rows = smaller<int64_t>(kWidth, args.output.size[1] - row);
        if (rows <= 0) return;
        for (int64_t t = 0; t < count;) {
            F32 sums[kTile];
            const Group* at = tokens + t * blocks;
            int64_t done = 1;
            if (count - t >= kTile) {
                done = kTile;
                multiply<F, kTile>(data, lane, at, blocks, sums);
            } else if (kTile > 8 && count - t >= 8) {
                done = 8;
                multiply<F, kTile < 8 ? kTile : 8>(data, lane, at, blocks, sums);
            } else if (kTile > 4 && count - t >= 4) {
                done = 4;
                multiply<F, kTile < 4 ? kTile : 4>(data, lane, at, blocks, sums);
            } else if (count - t >= 2) {
                done = 2;
                multiply<F, 2>(data, lane, at, blocks, sums);
            } else {
                multiply<F, 1>(data, lane, at, blocks, sums);
            }
            for (int64_t i = 0; i < done; ++i) {
                float* out = static_cast<float*>(args.output.data) + (first + t + i) * args.output.stride[0] + row;
                if (rows == kWidth) {
                    store(out, args.bias ? sums[i] + load(args.bias + row) : sums[i]);
                } else {
                    store_partial(out, args.bias ? sums[i] + load_partial(args.bias + row, rows) : sums[i], rows);
                }
            }
            t += done;
        }
    }
}

template <class F>
void dequantize_row(const uint8_t* panel, int lane, int64_t columns, float* out) {
    const int64_t blocks = ceil_div(columns, kBlockColumns);
    float super_scale = 0, super_minimum = 0;
    const uint8_t* at = panel;
    for (int64_t b = 0; b < blocks; ++b, at += F::kBlockBytes) {
        if (F::kSuper && b % kSuperBlocks == 0) {
            const F16* head = reinterpret_cast<const F16*>(at);
            super_scale = widen(head[lane]);
            if (F::kMinimum) super_minimum = widen(head[kPanelRows + lane]);
            at += F::kHeadBytes;
        }
        float scale[F::kParts], minimum = 0;
        const uint8_t *scales = at + F::kScaleAt, *minima = at + F::kMinimumAt;
        for (int part = 0; part < F::kParts; ++part) {
            const int place = part * kPanelRows + lane;
            if (!F::kSuper)
                scale[part] = widen(reinterpret_cast<const F16*>(scales)[place]);
            else
                scale[part] = super_scale * (F::kMinimum ? static_cast<float>(scales[place])
                                                         : static_cast<float>(static_cast<int8_t>(scales[place])));
        }
        if (F::kMinimum)
            minimum = F::kSuper ? -(super_minimum * static_cast<float>(minima[lane]))
                                : widen(reinterpret_cast<const F16*>(minima)[lane]);
        const int64_t count = smaller<int64_t>(kBlockColumns, columns - b * kBlockColumns);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t word = i / 4, byte = lane * 4 + i % 4;
            int quant;
            if (F::kBits == 8) {
                quant = at[word * kWordBytes + byte];
            } else {
                quant = at[word % 4 * kWordBytes + byte] >> (word < 4 ? 0 : 4) & 15;
                if (F::kBits == 5) quant |= (at[F::kHighAt + byte] >> word & 1) << 4;
                if (F::kBits == 6) quant |= (at[F::kHighAt + word / 4 * kWordBytes + byte] >> word % 4 * 2 & 3) << 4;
            }
            out[b * kBlockColumns + i] =
                static_cast<float>(quant - F::kZero) * scale[i * F::kParts / kBlockColumns] + minimum;
        }
    }
}

}  // namespace

int packed_linear(const dsa_packed_linear_args& args) {
    const int64_t tokens = args.input.size[0], columns = args.input.size[1], rows = args.output.size[1];
    const int64_t blocks = ceil_div(columns, kBlockColumns), panels = ceil_div(rows, kPanelRows);
    const int64_t token_bytes = blocks * static_cast<int64_t>(sizeof(Group));
    const int64_t chunk = smaller(larger<int64_t>(kChunkBytes / larger<int64_t>(token_bytes, 1) / kTile * kTile, kTile), tokens);
    Scratch scratch(chunk * token_bytes);
    if (scratch.failed()) return DSA_OUT_OF_MEMORY;
    Group* quantized = scratch.at<Group>();
    return with_format(args.format, [&](auto format) {
        using F = decltype(format);
        for (int64_t first = 0; first < tokens; first += chunk) {
            const int64_t count = smaller(chunk, tokens - first);
            const int64_t pieces = ceil_div(count, kTokensAtATime);
            const bool few = count * columns < kWorkForThreads;
            for_each_item(pieces, few ? 1 : static_cast<int>(smaller<int64_t>(args.threads, pieces)), [&](int64_t piece, int) {
                const int64_t last = smaller((piece + 1) * kTokensAtATime, count);
                for (int64_t t = piece * kTokensAtATime; t < last; ++t)
                    quantize_token(args.input, first + t, quantized + t * blocks);
            });
            // Items small enough to be shared out evenly, large enough to be worth drawing.
            const int64_t together = larger<int64_t>(1, smaller<int64_t>(panels / (4 * larger(args.threads, 1)), 8));
            const int64_t items = ceil_div(panels, together);
            const bool small = count * rows * columns < kWorkForThreads;
            for_each_item(items, small ? 1 : static_cast<int>(smaller<int64_t>(args.threads, items)), [&](int64_t item, int) {
                const int64_t last = smaller((item + 1) * together, panels);
                for (int64_t panel = item * together; panel < last; ++panel)
                    multiply_panel<F>(args, panel, quantized, first, count, blocks);
            });
        }
        return static_cast<int>(DSA_OK);
    });
}

int packed_rows(const dsa_packed_rows_args& args) {
    const int64_t count = args.index.size[0], columns = args.output.size[1];
    const int32_t* index = static_cast<const int32_t*>(args.index.data);
    for (int64_t i = 0; i < count; ++i)
        if (index[i] < 0 || index[i] >= args.rows) return DSA_OUT_OF_RANGE;
    const int64_t items = ceil_div(count, kTokensAtATime);
    return with_format(args.format, [&](auto format) {
        using F = decltype(format);
        const int64_t bytes = F::panel_bytes(ceil_div(columns, kBlockColumns));
        for_each_item(items, static_cast<int>(smaller<int64_t>(args.threads, items)), [&](int64_t item, int) {
            const int64_t last = smaller((item + 1) * kTokensAtATime, count);
            for (int64_t i = item * kTokensAtATime; i < last; ++i)
                dequantize_row<F>(args.panels + index[i] / kPanelRows * bytes, index[i] % kPanelRows, columns,
                                  static_cast<float*>(args.output.data) + i * args.output.stride[0]);
        });
        return static_cast<int>(DSA_OK);
    });
}

}  // namespace dsa::DSA_ISA
