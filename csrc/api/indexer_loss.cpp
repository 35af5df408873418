#include "dsa/indexer_loss.h"

#include "common/isa.h"

DSA_DEFINE_OPERATION(indexer_loss, dsa_indexer_loss_args)
