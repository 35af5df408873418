#include "dsa/packed_latents.h"

#include "common/isa.h"

DSA_DEFINE_OPERATION(packed_attention, dsa_packed_attention_args)
DSA_DEFINE_OPERATION(pack_latents, dsa_pack_latents_args)
