#include "dsa/index_topk.h"

#include "common/isa.h"

DSA_DEFINE_OPERATION(index_topk, dsa_index_topk_args)
