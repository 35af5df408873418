"""The operations of sparse attention. They need torch only; DESIGN.md states what they share."""

from dsa.ops.dense_attention import dense_attention
from dsa.ops.index_projection import IndexWeights, index_projection
from dsa.ops.index_topk import index_topk
from dsa.ops.indexer_loss import indexer_loss
from dsa.ops.packed_latents import PackedLatents, pack_latents
from dsa.ops.packed_linear import (
    FORMATS,
    BlockFormat,
    PackedWeight,
    pack_blocks,
    pack_weight,
    packed_linear,
    packed_rows,
)
from dsa.ops.paging import PagedKeys, PagedLatents, physical_indices
from dsa.ops.quantize import QuantizedKeys, hadamard_transform, quantize_index_keys, quantize_index_queries
from dsa.ops.sparse_attention import sparse_attention

__all__ = [
    "FORMATS",
    "BlockFormat",
    "IndexWeights",
    "PackedLatents",
    "PackedWeight",
    "PagedKeys",
    "PagedLatents",
    "QuantizedKeys",
    "dense_attention",
    "hadamard_transform",
    "index_projection",
    "index_topk",
    "indexer_loss",
    "pack_blocks",
    "pack_latents",
    "pack_weight",
    "packed_linear",
    "packed_rows",
    "physical_indices",
    "quantize_index_keys",
    "quantize_index_queries",
    "sparse_attention",
]
