"""What an indexer makes of hidden states, in plain torch.

Shapes: `B` batch, `T` tokens, `C` hidden size, `Hi`/`Di` index heads / index head dim, `R` rotated dims.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa.ops.index_projection.types import NORM_EPSILON, IndexWeights, Rope
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


def rope_tables(cos: Tensor, sin: Tensor) -> Rope:
    """`Rope` out of the cosines and sines `[B or 1, T, R/2]` of one angle per pair."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE, as `Rope` has it, to the first `cos.shape[-1]` dims of `x`."""
    width = cos.shape[-1]
    rotated = x if width == x.shape[-1] else x[..., :width]
    turned = rotated * cos.to(x.dtype) + rotated.roll(width // 2, -1) * sin.to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)
