// What an indexer makes of the hidden states of a few tokens, in one pass: queries, head weights, and keys in the cache.
#ifndef DSA_INDEX_PROJECTION_H
#define DSA_INDEX_PROJECTION_H

#include "dsa/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

// Shapes: B batch, T tokens, C hidden size, Hi/Di index heads / index head dim, R rotated dims. What is given by a
// pointer alone is dense. Meaning: src/dsa/ops/index_projection/README.md.
typedef struct dsa_index_projection_args {
    dsa_tensor hidden;          // [B, T, C] fp32; the last stride is 1
    dsa_tensor key;             // [B, C', Di] int8 or fp32, tokens [begin, begin + T) written; the last stride is 1
    dsa_tensor key_scale;       // [B, C'] fp32, the same tokens written; absent where the keys are fp32
    const float* query_weight;  // [Hi * Di, C]
    const float* key_weight;    // [Di, C]
    const float* head_weight;   // [Hi, C]
    const float* norm_weight;   // [Di]
    const float* norm_bias;     // [Di]
    const float* cosine;        // [B or 1, T, R]
    const float* sine;          // [B or 1, T, R], negative in the first half
    float* query;               // [B, T, Hi, Di], written; or null, with `weight`: keys only
    float* weight;              // [B, T, Hi], written
    int64_t begin;              // begin + T <= C'
    int64_t heads;              // Hi
    int64_t rotated;            // R, even and at most Di; 0 for no rotation
    int64_t rope_batch;         // B or 1
    float norm_epsilon;
    float head_scale;  // factor on the head weights
    int32_t threads;
} dsa_index_projection_args;

DSA_EXPORT int dsa_index_projection(const dsa_index_projection_args* args);

#ifdef __cplusplus
}
#endif
#endif
