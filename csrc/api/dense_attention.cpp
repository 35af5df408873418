#include "dsa/dense_attention.h"

#include "common/isa.h"

DSA_DEFINE_OPERATION(dense_attention, dsa_dense_attention_args)
DSA_DEFINE_OPERATION(dense_attention_backward, dsa_dense_attention_backward_args)
