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
#if defined(__x86_64__)
#define DSA_TOUCH(value) asm volatile("" : "+x"(value))
#elif defined(__aarch64__)
#define DSA_TOUCH(value) asm volatile("" : "+w"(value))
#else
#define DSA_TOUCH(value) asm volatile("" : "+m"(value))
#endif

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

// Several vectors as members of one another, and not as an array, which compilers keep in memory.
template <class V, int count>
struct Chains {
    V first;
    Chains<V, count - 1> rest;
    template <class Step>
    DSA_INLINE void each(const Step& step) {
        step(first);
        rest.each(step);
    }
};
template <class V>
struct Chains<V, 0> {
    template <class Step>
    DSA_INLINE void each(const Step&) {}
};

float multiply_add() {
    F32 factor = broadcast(0.999f), total = zero();
    const F32 term = broadcast(0.001f);
    Chains<F32, kChains> chains;
    chains.each([&](F32& chain) {
        chain = term;
        DSA_TOUCH(chain.v);  // So that they are not known to be equal.
    });
    for (int64_t round = 0; round < kRoundsAtATime; ++round) {
        DSA_TOUCH(factor.v);
        chains.each([&](F32& chain) { chain = fma(chain, factor, term); });
    }
    chains.each([&](F32& chain) { total += chain; });
    return reduce_add(total);
}

// The densest way of each instruction set to multiply bytes and add them in 32 bits, as the index kernel may use it:
// keys of 8 bits and queries of 7, so that two products of pairs fit 16 bits.
#if defined(__AVX512VNNI__)
using Bytes = __m512i;
constexpr int64_t kByteProducts = 64;
DSA_INLINE Bytes all(int value) { return _mm512_set1_epi32(value); }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes, Bytes b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVX512BW__)
using Bytes = __m512i;
constexpr int64_t kByteProducts = 128;
DSA_INLINE Bytes all(int value) { return _mm512_set1_epi32(value); }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes second, Bytes b) {
    const Bytes pairs = _mm512_add_epi16(_mm512_maddubs_epi16(a, b), _mm512_maddubs_epi16(second, b));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#elif defined(__AVXVNNI__)
using Bytes = __m256i;
constexpr int64_t kByteProducts = 32;
DSA_INLINE Bytes all(int value) { return _mm256_set1_epi32(value); }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes, Bytes b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#elif defined(__AVX2__)
using Bytes = __m256i;
constexpr int64_t kByteProducts = 64;
DSA_INLINE Bytes all(int value) { return _mm256_set1_epi32(value); }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes second, Bytes b) {
    const Bytes pairs = _mm256_add_epi16(_mm256_maddubs_epi16(a, b), _mm256_maddubs_epi16(second, b));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#elif defined(__x86_64__)
// Nothing multiplies bytes before SSSE3: widened to 16 bits.
using Bytes = __m128i;
constexpr int64_t kByteProducts = 8;
DSA_INLINE Bytes all(int value) { return _mm_set1_epi32(value); }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes, Bytes b) { return _mm_add_epi32(sum, _mm_madd_epi16(a, b)); }
#elif defined(__aarch64__)
using Bytes = int32x4_t;
constexpr int64_t kByteProducts = 16;
DSA_INLINE Bytes all(int value) { return vdupq_n_s32(value); }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes, Bytes b) {
    const int8x16_t x = vreinterpretq_s8_s32(a), y = vreinterpretq_s8_s32(b);
    const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(y));
    return vpadalq_s16(sum, vmlal_s8(low, vget_high_s8(x), vget_high_s8(y)));
}
#else
using Bytes = NativeInt;
constexpr int64_t kByteProducts = 4;
DSA_INLINE Bytes all(int value) { return NativeInt{value, value, value, value}; }
DSA_INLINE Bytes dot(Bytes sum, Bytes a, Bytes, Bytes b) { return sum + a * b; }
#endif

// Named one by one: GCC 12 keeps an array of them in memory.
#define DSA_FOR_EACH_SUM(X) X(s0) X(s1) X(s2) X(s3) X(s4) X(s5) X(s6) X(s7)
constexpr int kByteChains = 8;

float multiply_bytes() {
    Bytes a = all(0x01020301), second = a, total = all(0);
    const Bytes b = all(0x03010201);
#define DSA_BEGIN(sum) \
    Bytes sum = b;     \
    DSA_TOUCH(sum);
#define DSA_ADD_PRODUCTS(sum) \
    DSA_TOUCH(a);                 \
    DSA_TOUCH(second);            \
    sum = dot(sum, a, second, b);
#define DSA_ADD_UP(sum) total ^= sum;
    DSA_FOR_EACH_SUM(DSA_BEGIN)
    for (int64_t round = 0; round < kRoundsAtATime; ++round) {
        DSA_FOR_EACH_SUM(DSA_ADD_PRODUCTS)
    }
    DSA_FOR_EACH_SUM(DSA_ADD_UP)
    uint32_t first;
    memcpy(&first, &total, sizeof first);
    return 1.0f + static_cast<float>(first % 256);
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
    *args.amount = args.repeats * kRoundsAtATime * (bytes ? kByteChains * kByteProducts : kChains * kWidth);
    return DSA_OK;
}

}  // namespace dsa::DSA_ISA
