// Attention of each query over the tokens selected for it, and its gradients.
#ifndef DSA_SPARSE_ATTENTION_H
#define DSA_SPARSE_ATTENTION_H

#include "dsa/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

// Shapes: B batch, T query tokens, S key tokens, H/G query / KV heads, D/Dv head dims of keys / values, K places.
// Meaning: src/dsa/ops/sparse_attention/README.md. Floating-point inputs are fp32, bf16 or fp16, each its own.
typedef struct dsa_sparse_attention_args {
    dsa_tensor q;            // [B, T, H, D]
    dsa_tensor k;            // [B, S, G, D]; the last stride is 1
    dsa_tensor v;            // [B, S, G, Dv]; the last stride is 1
    dsa_tensor indices;      // [B, T, K] int32; the last stride is 1
    dsa_tensor sink_logits;  // [H], or absent
    dsa_tensor out;          // [B, T, H, Dv] in the dtype of q, written; the last stride is 1
    dsa_tensor lse;          // [B, T, H] fp32, written
    // Set to 1 when an index lies outside [-1, S), which is skipped like -1, and else left alone.
    int32_t* outside;
    float scale;
    float softcap;  // 0 for none
    int32_t threads;
} dsa_sparse_attention_args;

DSA_EXPORT int dsa_sparse_attention(const dsa_sparse_attention_args* args);

// Indices outside [-1, S) are skipped like -1. Every gradient may be absent. The result is the same for any number of
// threads.
typedef struct dsa_sparse_attention_backward_args {
    dsa_tensor q, k, v, indices, sink_logits;  // as above
    dsa_tensor lse;                            // [B, T, H] fp32, as the forward pass wrote it
    dsa_tensor grad_out;                       // [B, T, H, Dv]
    dsa_tensor grad_q;                         // [B, T, H, D] fp32, bf16 or fp16, written; the last stride is 1
    dsa_tensor grad_k;                         // [B, S, G, D] fp32, written; the last stride is 1
    dsa_tensor grad_v;                         // [B, S, G, Dv] fp32, written; the last stride is 1
    dsa_tensor grad_sink;                      // [H] fp32, written
    float scale;
    float softcap;  // 0 for none
    int32_t threads;
} dsa_sparse_attention_backward_args;

DSA_EXPORT int dsa_sparse_attention_backward(const dsa_sparse_attention_backward_args* args);

#ifdef __cplusplus
}
#endif
#endif
