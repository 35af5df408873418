// Products with weights in blocks of 4 to 8 bits, and rows of such weights as numbers.
#ifndef DSA_PACKED_LINEAR_H
#define DSA_PACKED_LINEAR_H

#include "dsa/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

// Numbers of ggml's enum ggml_type.
enum dsa_weight_format {
    DSA_Q4_0 = 2, DSA_Q4_1 = 3, DSA_Q5_0 = 6, DSA_Q5_1 = 7, DSA_Q8_0 = 8, DSA_Q4_K = 12, DSA_Q5_K = 13, DSA_Q6_K = 14
};

// Shapes: T tokens, C columns (features in), N rows (features out), P = ceil(N / 16) panels. What is given by a pointer
// alone is dense. Layout of a panel and arithmetic: src/dsa/ops/packed_linear/README.md.
typedef struct dsa_packed_linear_args {
    dsa_tensor input;       // [T, C] fp32, bf16 or fp16; the last stride is 1
    dsa_tensor output;      // [T, N] fp32, written; the last stride is 1
    const uint8_t* panels;  // [P, bytes of a panel]
    const float* bias;      // [N], or null
    int32_t format;         // dsa_weight_format
    int32_t threads;
} dsa_packed_linear_args;

DSA_EXPORT int dsa_packed_linear(const dsa_packed_linear_args* args);

// Returns DSA_OUT_OF_RANGE for an index outside [0, N).
typedef struct dsa_packed_rows_args {
    dsa_tensor index;       // [T] int32, dense
    dsa_tensor output;      // [T, C] fp32, written; the last stride is 1
    const uint8_t* panels;  // [P, bytes of a panel]
    int64_t rows;           // N
    int32_t format;
    int32_t threads;
} dsa_packed_rows_args;

DSA_EXPORT int dsa_packed_rows(const dsa_packed_rows_args* args);

#ifdef __cplusplus
}
#endif
#endif
