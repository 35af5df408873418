// The lightning indexer and its selection in one pass: scores are compared with the best so far and never written.
#ifndef DSA_INDEX_TOPK_H
#define DSA_INDEX_TOPK_H

#include "dsa/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

// Shapes: B batch, T query tokens, S key tokens, Hi/Di index heads / index head dim, Gs selections of a query, K top-k. The
// dim of the selections may be missing from both tensors that have it: there is one, then. Meaning and arithmetic:
// src/dsa/ops/index_topk/README.md.
typedef struct dsa_index_topk_args {
    dsa_tensor query;      // [B, T, Hi, Di] fp32, bf16 or fp16; rotated already where the keys are e4m3
    dsa_tensor key;        // [B, S, Di] int8, e4m3, fp32, bf16 or fp16; Di below 2^17
    dsa_tensor key_scale;  // [B, S] fp32 where the keys are int8 or e4m3, else absent
    dsa_tensor weight;     // [B, T, Gs, Hi] fp32, bf16 or fp16
    dsa_tensor key_start;  // [B, T] int32 in [0, S], or absent: 0
    dsa_tensor key_end;    // [B, T] int32 in [0, S], or absent: S - T + t + 1, at least 0
    dsa_tensor selection;  // [B, T, Gs, K] int32, written; dense
    float scale;
    int32_t sinks, local;  // sinks + local <= K
    int32_t threads;
} dsa_index_topk_args;

DSA_EXPORT int dsa_index_topk(const dsa_index_topk_args* args);

#ifdef __cplusplus
}
#endif
#endif
