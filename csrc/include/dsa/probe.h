// What this machine can do at most, with the instructions that the kernels use: the floor that they are judged by.
#ifndef DSA_PROBE_H
#define DSA_PROBE_H

#include "dsa/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

enum dsa_probe_kind {
    DSA_PROBE_READ = 0,          // reads `buffer`, counts bytes
    DSA_PROBE_MULTIPLY_ADD = 1,  // multiplies and adds in fp32 in registers, counts multiply-adds
    DSA_PROBE_INT8 = 2           // multiplies and adds bytes into int32 in registers, counts multiply-adds
};

typedef struct dsa_probe_args {
    dsa_tensor buffer;  // [n] fp32, contiguous; only for DSA_PROBE_READ
    dsa_tensor sink;    // [threads] fp32, written, so that no work can be left out
    int64_t repeats;    // how often the buffer is read, or thousands of rounds of the arithmetic
    int64_t* amount;    // written: the bytes or multiply-adds of all threads together
    int32_t kind;
    int32_t streams;    // from how many places a thread reads at once, 1 to 8
    int32_t threads;
} dsa_probe_args;

DSA_EXPORT int dsa_probe(const dsa_probe_args* args);

#ifdef __cplusplus
}
#endif
#endif
