"""`index_projection` through the compiled kernel.

Shapes: `B` batch, `T` tokens, `C` hidden size, `Hi`/`Di` index heads / index head dim.
"""

from __future__ import annotations

import struct

from torch import Tensor

from dsa.ops import native_support
from dsa.ops.index_projection.types import NORM_EPSILON, IndexWeights, Rope
from dsa.ops.quantize.types import QuantizedKeys

_pack_rest = struct.Struct("=4Q4q2fi4x").pack
"""What follows the addresses of the weights in `dsa_index_projection_args`: four more addresses, begin, heads, rotated
dims, batch of the tables, epsilon of the norm, factor on the head weights, threads."""


def index_projection(
    hidden: Tensor,
    weights: IndexWeights,
    addresses: bytes,
    rope: Rope | None,
    out: Tensor | QuantizedKeys,
    begin: int,
    *,
    queries: bool,
) -> tuple[Tensor, Tensor] | None:
    """Arguments as in `api.index_projection`, validated, with the weights' addresses."""
    batch, tokens, _ = hidden.shape
    heads = weights.heads
    made = None
    query = weight = cosine = sine = rotated = rope_batch = 0
    if queries:
        made = hidden.new_empty((batch, tokens, heads, weights.dim)), hidden.new_empty((batch, tokens, heads))
        query, weight = made[0].data_ptr(), made[1].data_ptr()
    if rope is not None:
        cosine, sine = rope[0].data_ptr(), rope[1].data_ptr()
        rope_batch, _, rotated = rope[0].shape
    data, scale = (out.data, out.scale) if isinstance(out, QuantizedKeys) else (out, None)
    threads = native_support.threads()
    rest = _pack_rest(
        cosine, sine, query, weight, begin, heads, rotated, rope_batch, NORM_EPSILON, heads**-0.5, threads
    )
    native_support.call("index_projection", native_support.pack(hidden, data, scale) + addresses + rest)
    return made
