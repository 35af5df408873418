#include "dsa/sparse_attention.h"

#include "common/isa.h"

DSA_DEFINE_OPERATION(sparse_attention, dsa_sparse_attention_args)
DSA_DEFINE_OPERATION(sparse_attention_backward, dsa_sparse_attention_backward_args)
