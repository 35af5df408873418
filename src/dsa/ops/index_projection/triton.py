"""`index_projection` on GPUs: the products are torch's; what a key needs then is one kernel that writes into the cache.

LayerNorm, RoPE, the Hadamard rotation, rounding to eight bits and the store read each projected key once and write it
once. All of it is computed in fp32, whatever the dtype of the hidden states.

Shapes: `B` batch, `T` tokens, `C` hidden size, `Hi`/`Di` index heads / index head dim, `R` rotated dims.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dsa.ops.index_projection.types import NORM_EPSILON, IndexWeights, Rope, rotate_half_split
from dsa.ops.quantize.triton import encode, hadamard, levels_of, scale_of
from dsa.ops.quantize.types import QuantizedKeys
from dsa.ops.triton_support import on

_LEVELS = {torch.int8: 127.0, torch.uint8: 448.0}
_ROWS_PER_PROGRAM = 16


@triton.jit
def _normalised(x, inside, weight, bias, epsilon, DIM: tl.constexpr):
    """LayerNorm of the rows of `x`, zeros outside; and mean and factor of each row."""
    mean = tl.sum(x, axis=1) / DIM
    centred = tl.where(inside, x - mean[:, None], 0.0)
    factor = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / DIM + epsilon)
    return centred * factor[:, None] * weight[None, :] + bias[None, :], mean, factor


@triton.jit
def _append_kernel(
    x_ptr,
    norm_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    data_ptr,
    scale_ptr,
    rows,
    tokens,
    x_strides,
    cos_strides,
    sin_strides,
    data_strides,
    scale_strides,
    epsilon,
    normalizer,
    levels,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HADAMARD: tl.constexpr,
    QUANTISED: tl.constexpr,
    FP8: tl.constexpr,
):
    """Rows of the projected keys `x[B, T, Di]` to `data[B, T, Di]` and `scale[B, T]`, the places of new tokens."""
    stride_xb, stride_xt, stride_xd = x_strides
    stride_cb, stride_ct, stride_cd = cos_strides
    stride_nb, stride_nt, stride_nd = sin_strides
    stride_db, stride_dt, stride_dd = data_strides
    stride_sb, stride_st = scale_strides
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = row < rows
    b = (row // tokens).to(tl.int64)
    t = (row % tokens).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    real = dim < DIM
    inside = present[:, None] & real[None, :]
    source = (x_ptr + b * stride_xb + t * stride_xt)[:, None]
    x = tl.load(source + (dim * stride_xd)[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + dim, mask=real, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + dim, mask=real, other=0.0).to(tl.float32)
    key, mean, factor = _normalised(x, inside, weight, bias, epsilon, DIM)
    if ROTATED > 0:
        # The other of each pair is read again and normalised likewise, in place of a move between threads.
        turning = dim < ROTATED
        other = tl.where(turning, (dim + ROTATED // 2) % ROTATED, dim)
        x = tl.load(source + (other * stride_xd)[None, :], mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(norm_ptr + other, mask=real, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + other, mask=real, other=0.0).to(tl.float32)
        partner = (x - mean[:, None]) * factor[:, None] * weight[None, :] + bias[None, :]
        angles = present[:, None] & turning[None, :]
        cos_row, sin_row = (cos_ptr + b * stride_cb + t * stride_ct), (sin_ptr + b * stride_nb + t * stride_nt)
        cos = tl.load(cos_row[:, None] + (dim * stride_cd)[None, :], mask=angles, other=1.0).to(tl.float32)
        sin = tl.load(sin_row[:, None] + (dim * stride_nd)[None, :], mask=angles, other=0.0).to(tl.float32)
        key = tl.where(turning[None, :], key * cos + partner * sin, key)
    target = (data_ptr + b * stride_db + t * stride_dt)[:, None] + (dim * stride_dd)[None, :]
    if QUANTISED:
        if HADAMARD:
            key = hadamard(key, BLOCK_ROWS, BLOCK_D) * normalizer
        scale = scale_of(key, levels, BLOCK_ROWS, False)
        tl.store(target, encode(levels_of(key, scale, levels, BLOCK_ROWS, BLOCK_D), FP8), mask=inside)
        tl.store(scale_ptr + b * stride_sb + t * stride_st, scale, mask=present)
    else:
        tl.store(target, key, mask=inside)


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
    data, scale = (out.data, out.scale) if isinstance(out, QuantizedKeys) else (out, None)
    places = slice(begin, begin + hidden.shape[1])
    data = data.view(torch.uint8) if data.dtype == torch.float8_e4m3fn else data
    cos, sin = (None, None) if rope is None else rope
    key = F.linear(hidden, to_key)
    _append(key, norm, norm_bias, cos, sin, data[:, places], None if scale is None else scale[:, places])
    if not queries:
        return None
    query = F.linear(hidden, to_query).unflatten(-1, (weights.heads, weights.dim))
    if rope is not None:
        query = rotate_half_split(query, *(table.unsqueeze(2) for table in rope))
    return query, F.linear(hidden, to_head).float() * weights.heads**-0.5


@torch.library.custom_op("dsa::index_keys_append_triton", mutates_args=("data", "scale"))
def _append(
    key: Tensor, norm: Tensor, norm_bias: Tensor, cos: Tensor | None, sin: Tensor | None, data: Tensor,
    scale: Tensor | None,
) -> None:  # fmt: skip
    """One operator to `torch.compile`: projected keys `[B, T, Di]` into their places; fp8 as uint8."""
    batch, tokens, dim = key.shape
    rows = batch * tokens
    if not rows:
        return
    # One row of tables serves every batch row.
    table_strides = [
        (0, 0, 0) if table is None else (table.stride(0) * (table.shape[0] > 1), *table.stride()[1:])
        for table in (cos, sin)
    ]
    with on(key.device):
        _append_kernel[(triton.cdiv(rows, _ROWS_PER_PROGRAM),)](
            key, norm.contiguous(), norm_bias.contiguous(), key if cos is None else cos, key if sin is None else sin,
            data, data if scale is None else scale, rows, tokens,
            key.stride(), *table_strides, data.stride(), (0, 0) if scale is None else scale.stride(),
            NORM_EPSILON, dim**-0.5, _LEVELS.get(data.dtype, 1.0),
            DIM=dim, BLOCK_D=triton.next_power_of_2(dim), ROTATED=0 if cos is None else cos.shape[-1],
            BLOCK_ROWS=_ROWS_PER_PROGRAM, HADAMARD=dim & (dim - 1) == 0, QUANTISED=scale is not None,
            FP8=data.dtype == torch.uint8, num_warps=4,
        )  # fmt: skip


@_append.register_fake
def _(
    key: Tensor, norm: Tensor, norm_bias: Tensor, cos: Tensor | None, sin: Tensor | None, data: Tensor,
    scale: Tensor | None,
) -> None:  # fmt: skip
    return None
