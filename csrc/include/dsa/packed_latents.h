// FP8 rows of latent attention: writing them, and attention of each query over those selected for it.
#ifndef DSA_PACKED_LATENTS_H
#define DSA_PACKED_LATENTS_H

#include "dsa/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

// Shapes: B batch, T query tokens, S key tokens, H query heads, L/R latent / rotated dims, K places. A row is L e4m3
// values, ceil(L / 128) fp32 scales and R bf16 values, without padding: src/dsa/ops/packed_latents/README.md.
typedef struct dsa_packed_attention_args {
    dsa_tensor q;            // [B, T, H, L + R] fp32, bf16 or fp16
    dsa_tensor rows;         // [B, S, bytes of a row] int8; the last stride is 1
    dsa_tensor indices;      // [B, T, K] int32; the last stride is 1
    dsa_tensor sink_logits;  // [H] fp32, bf16 or fp16, or absent
    dsa_tensor out;          // [B, T, H, L] in the dtype of q, written; the last stride is 1
    dsa_tensor lse;          // [B, T, H] fp32, written
    // Set to 1 when an index lies outside [-1, S), which is skipped like -1, and else left alone.
    int32_t* outside;
    float scale;
    float softcap;  // 0 for none
    int32_t latent_dim;
    int32_t threads;
} dsa_packed_attention_args;

DSA_EXPORT int dsa_packed_attention(const dsa_packed_attention_args* args);

typedef struct dsa_pack_latents_args {
    dsa_tensor rows;  // [B, S, L + R] fp32, bf16 or fp16
    dsa_tensor out;   // [B, S, bytes of a row] int8, written; the last stride is 1
    int32_t latent_dim;
    int32_t power_of_two;  // whether scales are rounded up to powers of two
    int32_t threads;
    int32_t unused;
} dsa_pack_latents_args;

DSA_EXPORT int dsa_pack_latents(const dsa_pack_latents_args* args);

#ifdef __cplusplus
}
#endif
#endif
