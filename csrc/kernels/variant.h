// Included first by every kernel: the namespace of the instruction set that is being compiled, and what every kernel
// needs there.
//
// A kernel file is compiled once for each instruction set, so whatever it defines must carry that set's namespace:
// an inline function or template of another namespace (anything of the C++ standard library that is not a type
// trait) would be compiled several times under one name, and the linker might keep the one that an older processor
// cannot run. tests/native/test_library.py looks for such symbols.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common/parallel.h"
#include "dsa/tensor.h"

#ifndef DSA_ISA
#error "compile kernels through csrc/CMakeLists.txt, which defines DSA_ISA"
#endif

#define DSA_INLINE inline __attribute__((always_inline))
#define DSA_RESTRICT __restrict__

namespace dsa::DSA_ISA {
namespace {

template <class T>
DSA_INLINE T smaller(T a, T b) {
    return a < b ? a : b;
}

template <class T>
DSA_INLINE T larger(T a, T b) {
    return a > b ? a : b;
}

DSA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

DSA_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// `body(item, worker)` for every item, on up to `threads` threads; see common/parallel.h.
template <class Body>
void for_each_item(int64_t items, int threads, const Body& body) {
    parallel_for(
        items, threads,
        [](void* context, int64_t item, int worker) { (*static_cast<const Body*>(context))(item, worker); },
        const_cast<Body*>(&body));
}

// Scratch memory aligned to a cache line (and to every vector), freed at the end of its scope. Not initialised.
class Scratch {
  public:
    explicit Scratch(int64_t bytes) : data_(aligned_alloc(64, static_cast<size_t>(round_up(bytes + 1, 64)))) {}
    ~Scratch() { free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    bool failed() const { return data_ == nullptr; }
    template <class T>
    T* at(int64_t byte_offset = 0) const {
        return reinterpret_cast<T*>(static_cast<char*>(data_) + byte_offset);
    }

  private:
    void* data_;
};

}  // namespace
}  // namespace dsa::DSA_ISA
