"""`sparse_attention` on NVIDIA GPUs from compute capability 8.0 on: the operators, and the forward pass.

The forward pass launches the kernels of `triton_forward.py`, and those of `triton_shared.py` where neighbouring queries
share tiles. `triton_gradients.py` launches the backward pass, and `triton_configs.py` says which tiles there are.

Forward and backward are custom operators of torch, so that compiled graphs hold them as one node each and CUDA graphs
capture them; nothing in here waits for the device.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values,
`K` selected tokens, `R = H / G` query heads that share a KV head, `X` splits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsa.ops.sparse_attention.triton_configs import (
    forward_candidates,
    shape_key,
    split_count,
    union_candidates,
    values_in_keys,
)
from dsa.ops.sparse_attention.triton_forward import attend, merge_splits
from dsa.ops.sparse_attention.triton_gradients import backward
from dsa.ops.sparse_attention.triton_shared import attend_union, collect, mark
from dsa.ops.triton_support import Config, capability, launch_chosen, on
from dsa.ops.triton_tiles import TILE_DTYPES, precision, product_dtype, split_width

SHARING_BYTES = 128 << 20
"""What the tables of neighbouring queries' unions may take at once; blocks of queries go in turns beyond that."""

SHARING_ROWS = 1024
"""How many queries there must be before neighbours share tiles."""

LONGEST_UNION = 4
"""How many times `K` a union may be long: beyond, its tiles hold more masked products than the queries' own hold
padding."""


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as in `api.sparse_attention`, validated but for the values of the indices.

    An index outside `[0, S)` is skipped. Products of 16-bit inputs of one dtype are taken in it and summed in fp32;
    other inputs are multiplied in fp32 (three tf32 products each).
    """
    # The kernels read them one after the other, whatever the caller's stride.
    dense_sinks = None if sink_logits is None else sink_logits.contiguous()
    return _forward(q, k, v, indices, dense_sinks, scale, softcap)


@torch.library.custom_op("dsa::sparse_attention_triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, indices, sink_logits, scale, softcap)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    out = torch.empty(batch, tokens, heads, v.shape[-1], dtype=q.dtype, device=q.device)
    return out, torch.empty(batch, tokens, heads, dtype=torch.float32, device=q.device)


@torch.library.custom_op("dsa::sparse_attention_triton_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sink_logits: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward(grad_out, q, k, v, indices, sink_logits, out, lse, scale, softcap)


@_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sink_logits: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sink = q.new_empty(0) if sink_logits is None else torch.empty_like(sink_logits)
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return grad_q, grad_k, grad_v, sink


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, sink_logits, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, indices, sink_logits, *output)
    ctx.mark_non_differentiable(output[1])


@once_differentiable
def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, indices, sink_logits, out, lse = ctx.saved_tensors
    grads = _backward(grad_out, q, k, v, indices, sink_logits, out, lse, ctx.scale, ctx.softcap)
    wanted = ctx.needs_input_grad
    q_grad, k_grad, v_grad, sink_grad = (grad if want else None for grad, want in zip(grads, (*wanted[:3], wanted[4])))
    return q_grad, k_grad, v_grad, None, sink_grad, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float | None,
    splits: int | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """`out[B, T, H, Dv]` and `lse[B, T, H]`.

    Args:
        splits: Into how many parts each selection is cut; `None` takes as many as fill the device.
        config: Sizes to use instead of the chosen ones.
    """
    batch, tokens, heads, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[-1])
    lse = torch.empty(batch, tokens, heads, dtype=torch.float32, device=q.device)
    if not out.numel() or not k.shape[1] or not indices.shape[-1]:
        # Nothing to select from. A value without columns has a logarithm all the same, and 16 of zeros give it.
        if lse.numel() and k.shape[1] and indices.shape[-1]:
            v = v.new_zeros(()).expand(*v.shape[:3], 16)
            return out, forward(q, k, v, indices, sink_logits, scale, softcap, splits, config)[1]
        return out.zero_(), lse.fill_(-torch.inf)

    flags, block = None, 0
    if splits is None and config is None and _shares_tiles(q, k, v):
        flags, block = _launch_shared(q, k, v, indices, sink_logits, scale, softcap, out, lse)

    def launch(config: Config) -> None:
        _launch_forward(q, k, v, indices, sink_logits, scale, softcap, out, lse, splits, config, flags, block)

    rows = triton.next_power_of_2(min(batch * tokens, 4096))
    shape = (heads, k.shape[2], *shape_key(q, k, v), rows, indices.shape[-1])
    configs = forward_candidates(q, k, v) if config is None else [config]
    if block:
        # What is left over says nothing about which tile is fast.
        configs = configs[:1]
    launch_chosen("sparse_attention", shape, configs, q.device, launch)
    return out, lse


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
    splits: int | None,
    config: Config,
    flags: Tensor | None,
    flagged_queries: int,
) -> None:
    batch, tokens, heads, head_dim = q.shape
    keys, groups = k.shape[1:3]
    rows, value_dim, selected = batch * tokens, v.shape[-1], indices.shape[-1]
    shared = heads // groups
    programs = rows * groups * triton.cdiv(shared, config["BLOCK_HEADS"])
    if splits is None:
        splits = split_count(programs, selected, config["BLOCK_KEYS"], q.device)
    per_split = triton.cdiv(triton.cdiv(selected, splits), config["BLOCK_KEYS"]) * config["BLOCK_KEYS"]
    parts, logs = out, lse
    if splits > 1:
        parts = torch.empty(splits, rows, heads, value_dim, dtype=torch.float32, device=q.device)
        logs = torch.empty(splits, rows, heads, dtype=torch.float32, device=q.device)
    dtype = product_dtype(q, k, v)
    widest = 512 if dtype.itemsize == 2 else 128
    offsets, widths = split_width(head_dim, widest)
    v_offsets, v_widths = split_width(value_dim, widest)
    with on(q.device):
        attend[(programs * splits,)](
            q, k, v, indices, sink_logits, flags, parts, logs,
            q.stride(), k.stride(), v.stride(), indices.stride(),
            tokens, keys, selected, per_split, rows, triton.cdiv(tokens, max(1, flagged_queries)),
            scale, softcap or 1.0,
            HEADS=heads, GROUPS=groups, SIZE=head_dim, OFFSETS=offsets, WIDTHS=widths,
            V_SIZE=value_dim, V_OFFSETS=v_offsets, V_WIDTHS=v_widths, VALUES_IN_KEYS=values_in_keys(k, v, widest),
            SPLITS=splits, FLAGGED_QUERIES=flagged_queries,
            HAS_SINK=sink_logits is not None, HAS_SOFTCAP=softcap is not None,
            DTYPE=TILE_DTYPES[dtype], PRECISION=precision(dtype), **config,
        )  # fmt: skip
        if splits > 1:
            block = min(128, triton.next_power_of_2(value_dim))
            merge_splits[(rows * heads, triton.cdiv(value_dim, block))](
                parts, logs, sink_logits, out, lse, rows,
                HEADS=heads, V_SIZE=value_dim, SPLITS=splits, PADDED_SPLITS=triton.next_power_of_2(splits),
                HAS_SINK=sink_logits is not None, BLOCK=block,
            )  # fmt: skip


def _shares_tiles(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether neighbouring queries are worth a tile together: many of them, each with few heads on a KV head."""
    if q.is_cuda and capability(q.device.index or 0)[0] == 10:
        # Triton 3.6 fails to compile `attend_union` for SM100.
        return False
    rows, shared = q.shape[0] * q.shape[1], q.shape[2] // k.shape[2]
    return rows >= SHARING_ROWS and shared <= 8 and product_dtype(q, k, v).itemsize == 2 and q.shape[3] <= 256


def _launch_shared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, int]:
    """Attends block by block over the union of the queries' selections.

    Returns:
        flags: int32, one a block of queries: not zero where the block is still to be done, query by query.
        queries: How many queries a block has.
    """
    batch, tokens, heads, head_dim = q.shape
    keys, groups = k.shape[1:3]
    selected, value_dim, device = indices.shape[-1], v.shape[-1], q.device
    padded_shared = triton.next_power_of_2(heads // groups)
    # 64 rows fill the matrix units; the bits of an int32 are the limit.
    queries = min(32, 64 // padded_shared)
    blocks_of_row = triton.cdiv(tokens, queries)
    blocks = batch * blocks_of_row
    capacity = triton.cdiv(min(keys, LONGEST_UNION * selected), 16) * 16
    at_once = max(1, min(blocks, SHARING_BYTES // (4 * keys + 8 * capacity)))
    flags = torch.zeros(blocks, dtype=torch.int32, device=device)
    positions, members = torch.empty(2, at_once, capacity, dtype=torch.int32, device=device)
    counts = torch.empty(at_once, dtype=torch.int32, device=device)
    offsets, widths = split_width(head_dim, 512)
    v_offsets, v_widths = split_width(value_dim, 512)
    dtype = product_dtype(q, k, v)
    configs = union_candidates(q, k, v, queries * padded_shared)
    for first in range(0, blocks, at_once):
        here = min(at_once, blocks - first)
        table = torch.zeros(here, keys, dtype=torch.int32, device=device)
        with on(device):
            mark[(here, queries)](
                indices, table, flags, indices.stride(), tokens, keys, selected, blocks_of_row, first,
                QUERIES=queries, BLOCK=1024,
            )  # fmt: skip
            collect[(here,)](table, positions, members, counts, flags, keys, capacity, first, BLOCK=2048)

        def launch(config: Config, first: int = first, here: int = here) -> None:
            with on(device):
                attend_union[(here * groups,)](
                    q, k, v, positions, members, counts, flags, sink_logits, out, lse,
                    q.stride(), k.stride(), v.stride(), tokens, keys, capacity, blocks_of_row, first,
                    scale, softcap or 1.0,
                    HEADS=heads, GROUPS=groups, SIZE=head_dim, OFFSETS=offsets, WIDTHS=widths,
                    V_SIZE=value_dim, V_OFFSETS=v_offsets, V_WIDTHS=v_widths,
                    HAS_SINK=sink_logits is not None, HAS_SOFTCAP=softcap is not None,
                    DTYPE=TILE_DTYPES[dtype], PRECISION=precision(dtype),
                    QUERIES=queries, PADDED_SHARED=padded_shared, **config,
                )  # fmt: skip

        shape = (heads, groups, *shape_key(q, k, v))
        launch_chosen("sparse_attention shared", shape, configs, device, launch)
    return flags, queries
