// The library itself: its version, the instruction sets, and the threads that run the kernels.
#ifndef DSA_RUNTIME_H
#define DSA_RUNTIME_H

#include "dsa/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

// Grows with every change that a caller must know of; src/dsa/ops/native_support.py refuses another.
#define DSA_ABI_VERSION 2
DSA_EXPORT int32_t dsa_abi_version(void);

// Names of the instruction sets that were compiled and that this processor has, best first, separated by commas.
DSA_EXPORT const char* dsa_isas(void);

// The one in use: the best, unless dsa_set_isa chose another.
DSA_EXPORT const char* dsa_isa(void);

// Uses one of dsa_isas() from now on. Returns 0, or -1 if it is none of them.
DSA_EXPORT int32_t dsa_set_isa(const char* name);

// Lets the kernels run on the threads of an OpenMP runtime that is in the process already: the address of its
// GOMP_parallel, or NULL for the library's own threads, which sleep between calls.
DSA_EXPORT void dsa_set_openmp(void* gomp_parallel);

#ifdef __cplusplus
}
#endif
#endif
