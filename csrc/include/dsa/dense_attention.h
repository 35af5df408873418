// Attention of each query over its visible range of keys, forward and backward.
#ifndef DSA_DENSE_ATTENTION_H
#define DSA_DENSE_ATTENTION_H

#include "dsa/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

// Shapes: B batch, T query tokens, S key tokens, H/G query / KV heads, D/Dv head dims of keys / values.
// q, k, v may be fp32, bf16 or fp16, each its own, with any strides. Semantics: src/dsa/ops/dense_attention/README.md.
typedef struct dsa_dense_attention_args {
    dsa_tensor q;            // [B, T, H, D]
    dsa_tensor k;            // [B, S, G, D]
    dsa_tensor v;            // [B, S, G, Dv]
    dsa_tensor sink_logits;  // [H] fp32, or absent
    dsa_tensor key_start;    // [B, T] int32 in [0, S], or absent: 0
    dsa_tensor key_end;      // [B, T] int32 in [0, S], or absent: S - T + t + 1, causal
    dsa_tensor out;          // [B, T, H, Dv] in the dtype of q, written; the last stride is 1
    dsa_tensor lse;          // [B, T, H] fp32, written
    float scale;
    float softcap;  // 0: none
    int32_t threads;
} dsa_dense_attention_args;

DSA_EXPORT int dsa_dense_attention(const dsa_dense_attention_args* args);

typedef struct dsa_dense_attention_backward_args {
    dsa_dense_attention_args forward;  // as in the forward pass; out and lse are what it wrote
    dsa_tensor grad_out;               // [B, T, H, Dv] fp32, bf16 or fp16
    dsa_tensor normaliser;             // [B, T, H] fp32: logarithm of the softmax's denominator, sink included
    dsa_tensor mean;    // [B, T, H] fp32, written: grad_out . out, the mean of the scores' upstream gradients
    dsa_tensor grad_q;  // [B, T, H, D] in the dtype of q, written; or absent
    dsa_tensor grad_k;  // [B, S, G, D] in the dtype of k, written; or absent
    dsa_tensor grad_v;  // [B, S, G, Dv] in the dtype of v, written; or absent
} dsa_dense_attention_backward_args;

DSA_EXPORT int dsa_dense_attention_backward(const dsa_dense_attention_backward_args* args);

#ifdef __cplusplus
}
#endif
#endif
