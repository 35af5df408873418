#include "dsa/quantize.h"

#include "common/isa.h"

DSA_DEFINE_OPERATION(quantize_keys, dsa_quantize_keys_args)
