// The divergence of the indexer from the attention it predicts, with its gradients.
#ifndef DSA_INDEXER_LOSS_H
#define DSA_INDEXER_LOSS_H

#include "dsa/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

// Shapes: B batch, T query tokens, S key tokens, Hi/Di index heads / index head dim, H/G query / KV heads, D head dim,
// K selected tokens. Floating-point inputs are fp32, bf16 or fp16, each its own, with any strides.
// Semantics: src/dsa/ops/indexer_loss/README.md.
typedef struct dsa_indexer_loss_args {
    dsa_tensor q_index;      // [B, T, Hi, Di]
    dsa_tensor k_index;      // [B, S, Di]
    dsa_tensor w_index;      // [B, T, Hi]
    dsa_tensor q;            // [B, T, H, D]
    dsa_tensor k;            // [B, S, G, D]
    dsa_tensor sink_logits;  // [H] fp32, or absent
    dsa_tensor indices;      // [B, T, K] int32 in [-1, S), or absent: all visible tokens
    dsa_tensor key_start;    // [B, T] int32 in [0, S]; a query that does not count has an empty range
    dsa_tensor key_end;      // [B, T] int32 in [0, S]
    dsa_tensor loss;         // [1] fp32, written
    dsa_tensor grad_q;       // [B, T, Hi, Di] fp32, written; all three gradients or none
    dsa_tensor grad_k;       // [B, S, Di] fp32, written
    dsa_tensor grad_w;       // [B, T, Hi] fp32, written
    int64_t sinks;
    int64_t local;
    float index_scale;
    float attention_scale;
    float softcap;  // 0: none
    int32_t threads;
} dsa_indexer_loss_args;

DSA_EXPORT int dsa_indexer_loss(const dsa_indexer_loss_args* args);

#ifdef __cplusplus
}
#endif
#endif
