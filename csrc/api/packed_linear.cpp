#include "dsa/packed_linear.h"

#include "common/isa.h"

DSA_DEFINE_OPERATION(packed_linear, dsa_packed_linear_args)
DSA_DEFINE_OPERATION(packed_rows, dsa_packed_rows_args)
