// The instruction sets that the kernels are compiled for, and the one in use.
#pragma once

#include <cstdint>

#include "dsa/tensor.h"

// Best first; csrc/CMakeLists.txt has the compiler's flags for the same names. On aarch64 the baseline is NEON.
#if defined(__x86_64__)
#define DSA_FOR_EACH_ISA(X, ...)  \
    X(avx512_vnni, ##__VA_ARGS__) \
    X(avx512, ##__VA_ARGS__)      \
    X(avx2_vnni, ##__VA_ARGS__)   \
    X(avx2, ##__VA_ARGS__)        \
    X(baseline, ##__VA_ARGS__)
#else
#define DSA_FOR_EACH_ISA(X, ...) X(baseline, ##__VA_ARGS__)
#endif

namespace dsa {

#define DSA_NAME(name) name,
enum class Isa : int { DSA_FOR_EACH_ISA(DSA_NAME) };
#undef DSA_NAME

Isa current_isa();

// Whether reading a cache in order is faster where nothing asks for what comes next: processors whose own prefetching gets
// in the way of the program's.
bool prefetches_alone();

}  // namespace dsa

#define DSA_DECLARE_VARIANT(name, op, Args) \
    namespace dsa::name {                   \
    int op(const Args&);                    \
    }
#define DSA_CALL_VARIANT(name, op) \
    case dsa::Isa::name:           \
        return dsa::name::op(*args);

// Defines the exported `int dsa_<op>(const Args*)`, which calls `op` of the instruction set in use.
#define DSA_DEFINE_OPERATION(op, Args)                            \
    DSA_FOR_EACH_ISA(DSA_DECLARE_VARIANT, op, Args)               \
    extern "C" DSA_EXPORT int dsa_##op(const Args* args) {        \
        switch (dsa::current_isa()) {                             \
            DSA_FOR_EACH_ISA(DSA_CALL_VARIANT, op)                \
        }                                                         \
        return DSA_OK;                                            \
    }
