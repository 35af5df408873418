// Measures the machine, not data: reading memory, and arithmetic that never leaves the registers. The caller takes the
// time. Interface: dsa/probe.h.
#include "dsa/probe.h"

#include "kernels/simd.h"

namespace dsa::DSA_ISA {
namespace {

// Independent chains: more than latency times throughput of any multiply-add, and they fit 16 registers.
constexpr int kChains = 12;
constexpr int64_t kRoundsAtATime = 1000;
constexpr int64_t kPiece = 1 << 18;  // Floats that a thread reads before it draws the next piece: 1 MB.

// Tells the compiler that the value may have changed, so that nothing is computed ahead of its loop.
template <class V>
DSA_INLINE void touch(V& value) {
#if defined(__x86_64__)
    asm volatile("" : "+x"(value));
#elif defined(__aarch64__)
    asm volatile("" : "+w"(value));
#else
    asm volatile("" : "+m"(value));
#endif
}

float read_piece(const float* piece, int64_t floats, int64_t streams) {
    F32 sums[8];
    for (F32& sum : sums) sum = zero();
    const int64_t length = floats / streams;
    for (int64_t stream = 0; stream + 1 < streams; stream += 2) {
        const float* a = piece + stream * length;
        const float* b = a + length;
        for (int64_t i = 0; i + 4 * kWidth <= length; i += 4 * kWidth) {
            for (int j = 0; j < 4; ++j) {
                sums[2 * j] += load(a + i + j * kWidth);
                sums[2 * j + 1] += load(b + i + j * kWidth);
            }
        }
    }
    if (streams % 2) {
        const float* a = piece + (streams - 1) * length;
        for (int64_t i = 0; i + 8 * kWidth <= length; i += 8 * kWidth)
            for (int j = 0; j < 8; ++j) sums[j] += load(a + i + j * kWidth);
    }
    for (int j = 1; j < 8; ++j) sums[0] += sums[j];
    return reduce_add(sums[0]);
}

float multiply_add() {
    F32 chain[kChains], factor = broadcast(0.999f), term = broadcast(0.001f);
    for (int c = 0; c < kChains; ++c) chain[c] = broadcast(static_cast<float>(c));
    for (int64_t round = 0; round < kRoundsAtATime; ++round) {
        touch(factor.v);
        for (int c = 0; c < kChains; ++c) chain[c] = fma(chain[c], factor, term);
    }
    for (int c = 1; c < kChains; ++c) chain[0] += chain[c];
    return reduce_add(chain[0]);
}

// The densest way of each instruction set to multiply bytes and add them in 32 bits, as the index kernel may use it:
// keys of 8 bits and queries of 7, so that two products of pairs fit 16 bits.
#if defined(__AVX512VNNI__)
using Bytes = __m512i;
constexpr int64_t kByteProducts = 64;
DSA_INLINE Bytes all(int value) { return _mm512_set1_epi32(value); }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVX512BW__)
using Bytes = __m512i;
constexpr int64_t kByteProducts = 128;
DSA_INLINE Bytes all(int value) { return _mm512_set1_epi32(value); }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes b) {
    Bytes second = a;
    touch(second);
    const Bytes pairs = _mm512_add_epi16(_mm512_maddubs_epi16(a, b), _mm512_maddubs_epi16(second, b));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#elif defined(__AVXVNNI__)
using Bytes = __m256i;
constexpr int64_t kByteProducts = 32;
DSA_INLINE Bytes all(int value) { return _mm256_set1_epi32(value); }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#elif defined(__AVX2__)
using Bytes = __m256i;
constexpr int64_t kByteProducts = 64;
DSA_INLINE Bytes all(int value) { return _mm256_set1_epi32(value); }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes b) {
    Bytes second = a;
    touch(second);
    const Bytes pairs = _mm256_add_epi16(_mm256_maddubs_epi16(a, b), _mm256_maddubs_epi16(second, b));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#elif defined(__x86_64__)
// Nothing multiplies bytes before SSSE3: widened to 16 bits.
using Bytes = __m128i;
constexpr int64_t kByteProducts = 8;
DSA_INLINE Bytes all(int value) { return _mm_set1_epi32(value); }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes b) { return _mm_add_epi32(sum, _mm_madd_epi16(a, b)); }
#elif defined(__aarch64__)
using Bytes = int32x4_t;
constexpr int64_t kByteProducts = 16;
DSA_INLINE Bytes all(int value) { return vdupq_n_s32(value); }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes b) {
    const int8x16_t x = vreinterpretq_s8_s32(a), y = vreinterpretq_s8_s32(b);
    const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(y));
    return vpadalq_s16(sum, vmlal_s8(low, vget_high_s8(x), vget_high_s8(y)));
}
#else
using Bytes = NativeInt;
constexpr int64_t kByteProducts = 4;
DSA_INLINE Bytes all(int value) { return NativeInt{value, value, value, value}; }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes b) { return sum + a * b; }
#endif

float multiply_bytes() {
    Bytes chain[kChains], a = all(0x01020301), b = all(0x03010201);
    for (Bytes& sum : chain) sum = all(0);
    for (int64_t round = 0; round < kRoundsAtATime; ++round) {
        touch(a);
        for (int c = 0; c < kChains; ++c) chain[c] = dot(chain[c], a, b);
    }
    float total = 0.0f;
    for (Bytes& sum : chain) {
        int32_t first;
        memcpy(&first, &sum, sizeof first);
        total += static_cast<float>(first);
    }
    return total;
}

}  // namespace

int probe(const dsa_probe_args& args) {
    const int threads = larger(args.threads, 1);
    float* sink = static_cast<float*>(args.sink.data);
    for (int worker = 0; worker < threads; ++worker) sink[worker] = 0.0f;
    if (args.kind == DSA_PROBE_READ) {
        const float* data = static_cast<const float*>(args.buffer.data);
        const int64_t pieces = args.buffer.size[0] / kPiece;
        const int64_t streams = larger<int64_t>(1, smaller<int64_t>(args.streams, 8));
        for_each_item(pieces * args.repeats, threads, [&](int64_t item, int worker) {
            sink[worker] += read_piece(data + item % pieces * kPiece, kPiece, streams);
        });
        *args.amount = pieces * args.repeats * kPiece * 4;
        return DSA_OK;
    }
    const bool bytes = args.kind == DSA_PROBE_INT8;
    for_each_item(args.repeats, threads,
                  [&](int64_t, int worker) { sink[worker] += bytes ? multiply_bytes() : multiply_add(); });
    *args.amount = args.repeats * kRoundsAtATime * kChains * (bytes ? kByteProducts : kWidth);
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
