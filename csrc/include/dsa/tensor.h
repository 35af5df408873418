// Tensors as the C ABI takes them.
//
// Everything in include/dsa is plain C: no torch, no Python, no C++ type crosses the boundary. The callers in
// src/dsa/ops validate shapes, dtypes, ranges and indices before a pointer is taken; the kernels trust them.
#ifndef DSA_TENSOR_H
#define DSA_TENSOR_H

#include <stdint.h>

#if defined(_WIN32)
#define DSA_EXPORT __declspec(dllexport)
#else
#define DSA_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum dsa_dtype { DSA_F32 = 0, DSA_BF16 = 1, DSA_F16 = 2, DSA_I8 = 3, DSA_I32 = 4, DSA_E4M3 = 5 };

// Up to four dimensions, leading ones first. Strides count elements and may be anything, the last one included,
// unless the operation says otherwise. `data == NULL` is an absent argument.
typedef struct dsa_tensor {
    void* data;
    int64_t size[4];
    int64_t stride[4];
    int32_t dtype;
    int32_t dims;
} dsa_tensor;

// What every operation returns. DSA_OUT_OF_RANGE: a position outside the keys; nothing was read through it.
enum dsa_status { DSA_OK = 0, DSA_OUT_OF_MEMORY = 1, DSA_OUT_OF_RANGE = 2 };

#ifdef __cplusplus
}
#endif
#endif
