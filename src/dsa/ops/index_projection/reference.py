"""What an indexer makes of hidden states, in plain torch.

Shapes: `B` batch, `T` tokens, `C` hidden size, `Hi`/`Di` index heads / index head dim, `R` rotated dims.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dsa.ops.index_projection.types import NORM_EPSILON, IndexWeights, Rope, rotate_half_split
from dsa.ops.quantize import reference as quantize
from dsa.ops.quantize.types import QuantizedKeys


def index_projection(
    hidden: Tensor,
    weights: IndexWeights,
    rope: Rope | None,
    out: Tensor | QuantizedKeys,
    begin: int,
    *,
    queries: bool,
) -> tuple[Tensor, Tensor] | None:
    """Arguments as in `api.index_projection`, validated."""
    to_query, to_key, to_head, norm, norm_bias = weights.tensors
    key = F.layer_norm(F.linear(hidden, to_key), (weights.dim,), norm, norm_bias, NORM_EPSILON)
    if rope is not None:
        key = rotate_half_split(key, *rope)
    places = slice(begin, begin + hidden.shape[1])
    if isinstance(out, QuantizedKeys):
        keys = quantize.quantize_keys_int8(key) if out.dtype == "int8" else quantize.quantize_keys_fp8(key)
        out.data[:, places].copy_(keys.data)
        out.scale[:, places] = keys.scale
    else:
        out[:, places] = key
    if not queries:
        return None
    query = F.linear(hidden, to_query).unflatten(-1, (weights.heads, weights.dim))
    if rope is not None:
        query = rotate_half_split(query, *(table.unsqueeze(2) for table in rope))
    return query, F.linear(hidden, to_head).float() * weights.heads**-0.5
