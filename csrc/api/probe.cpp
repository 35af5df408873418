#include "dsa/probe.h"

#include "common/isa.h"

DSA_DEFINE_OPERATION(probe, dsa_probe_args)
