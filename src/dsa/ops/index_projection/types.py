"""What the implementations share: the weights of an indexer and its tables of angles.

Shapes: `B` batch, `T` tokens, `C` hidden size, `Hi`/`Di` index heads / index head dim, `R` rotated dims.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NORM_EPSILON = 1e-6

Rope = tuple[Tensor, Tensor]
"""`cos, sin`, each `[B or 1, T, R]`, ready to be multiplied with: dims `i` and `i + R/2` are the pair that one angle
turns, and the sines of the first half are negated. `rope_tables` makes them out of angles."""


class IndexWeights(NamedTuple):
    """The weights of one indexer.

    Args:
        query: `[Hi * Di, C]`.
        key: `[Di, C]`.
        head: `[Hi, C]`, projection to the heads' weights.
        norm: `[Di]`, LayerNorm of the key.
        norm_bias: `[Di]`.
    """

    query: Tensor
    key: Tensor
    head: Tensor
    norm: Tensor
    norm_bias: Tensor
