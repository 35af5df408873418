"""What an indexer makes of the hidden states of a few tokens."""

from dsa.ops.index_projection.api import FEW_TOKENS, index_projection
from dsa.ops.index_projection.types import IndexWeights, Rope, rope_tables, rotate_half_split

__all__ = ["FEW_TOKENS", "IndexWeights", "Rope", "index_projection", "rope_tables", "rotate_half_split"]
