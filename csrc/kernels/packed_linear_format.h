// The block formats of packed weights, and where things lie in a panel.
//
// A panel is 16 rows. Of each block of 32 columns it has, one after the other: the low bits, the high bits, the scales
// and the minima of all 16 rows. A word is the bytes of four columns of each row, 64 in all: what one instruction
// multiplies. Four bits: byte `i` of word `w < 4` has its column's quant in the low half and that of word `w + 4` in the
// high half. Fifth bits: bit `w` of byte `i`. Fifth and sixth: bits `2 * (w % 4)` of byte `i` of vector `w / 4`.
#pragma once

#include "dsa/packed_linear.h"
#include "kernels/simd.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int kPanelRows = 16;
constexpr int kBlockColumns = 32;
constexpr int kWords = 8;
constexpr int kWordBytes = 4 * kPanelRows;
constexpr int kSuperBlocks = 8;  // Blocks that share a scale and a minimum of their scales and minima.

// `kZero` is the quant that means zero; `kParts`, how many scales 32 columns of a row have; with `kSuper` scales and
// minima are integers, to be multiplied with the superblock's.
template <int bits, int zero, bool minimum, bool super, int parts>
struct Format {
    static constexpr int kBits = bits, kZero = zero, kParts = parts;
    static constexpr bool kMinimum = minimum, kSuper = super;
    static constexpr int kHighAt = bits == 8 ? kWords * kWordBytes : kWords * kWordBytes / 2;
    static constexpr int kScaleAt = kHighAt + (bits == 5 ? kWordBytes : bits == 6 ? 2 * kWordBytes : 0);
    static constexpr int kScaleBytes = super ? 1 : 2;
    static constexpr int kMinimumAt = kScaleAt + parts * kPanelRows * kScaleBytes;
    static constexpr int kBlockBytes = kMinimumAt + (minimum ? kPanelRows * kScaleBytes : 0);
    static constexpr int kHeadBytes = super ? kPanelRows * 2 * (minimum ? 2 : 1) : 0;

    static int64_t panel_bytes(int64_t blocks) {
        return blocks * kBlockBytes + (super ? blocks / kSuperBlocks * kHeadBytes : 0);
    }
};

// Calls `body` with the format's type.
template <class Body>
int with_format(int32_t format, const Body& body) {
    switch (format) {
        case DSA_Q4_0: return body(Format<4, 8, false, false, 1>());
        case DSA_Q4_1: return body(Format<4, 0, true, false, 1>());
        case DSA_Q5_0: return body(Format<5, 16, false, false, 1>());
        case DSA_Q5_1: return body(Format<5, 0, true, false, 1>());
        case DSA_Q8_0: return body(Format<8, 128, false, false, 1>());
        case DSA_Q4_K: return body(Format<4, 0, true, true, 1>());
        case DSA_Q5_K: return body(Format<5, 0, true, true, 1>());
        default: return body(Format<6, 32, false, true, 2>());
    }
}

}  // namespace
}  // namespace dsa::DSA_ISA
