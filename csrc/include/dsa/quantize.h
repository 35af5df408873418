// Index keys in eight bits: rotated, quantised and stored in one pass over each token.
#ifndef DSA_QUANTIZE_H
#define DSA_QUANTIZE_H

#include "dsa/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

// Shapes: B batch, S tokens, Di index head dim. Arithmetic: src/dsa/ops/quantize/README.md.
typedef struct dsa_quantize_keys_args {
    dsa_tensor keys;   // [B, S, Di] fp32, bf16 or fp16
    dsa_tensor data;   // [B, S, Di] int8, written; the last stride is 1
    dsa_tensor scale;  // [B, S] fp32, written
    int32_t threads;
} dsa_quantize_keys_args;

DSA_EXPORT int dsa_quantize_keys(const dsa_quantize_keys_args* args);

#ifdef __cplusplus
}
#endif
#endif
