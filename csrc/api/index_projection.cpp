#include "dsa/index_projection.h"

#include "common/isa.h"

DSA_DEFINE_OPERATION(index_projection, dsa_index_projection_args)
