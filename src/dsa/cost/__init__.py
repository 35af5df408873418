"""What attention costs, predicted: pairs of tokens, operations and bytes as functions of length and K."""

from dsa.cost.attention import (
    NOTHING,
    AttentionShape,
    Cost,
    LayerKind,
    kind_of,
    layer_cost,
    mean_read,
    mean_scanned,
    model_cost,
)
from dsa.cost.pairs import Pairs

__all__ = [
    "NOTHING",
    "AttentionShape",
    "Cost",
    "LayerKind",
    "Pairs",
    "kind_of",
    "layer_cost",
    "mean_read",
    "mean_scanned",
    "model_cost",
]
