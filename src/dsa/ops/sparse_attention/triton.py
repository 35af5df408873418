"""`sparse_attention` on NVIDIA GPUs from compute capability 8.0 on: launches the kernels of `triton_forward.py` and
`triton_backward.py`.

Forward and backward are custom operators of torch, so that compiled graphs hold them as one node each and CUDA graphs
capture them; nothing in here waits for the device.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values,
`K` selected tokens, `R = H / G` query heads that share a KV head, `X` splits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsa.ops.sparse_attention.triton_backward import attend_backward, sum_by_key
from dsa.ops.sparse_attention.triton_forward import attend, merge_splits
from dsa.ops.sparse_attention.triton_shared import attend_union, collect, mark
from dsa.ops.triton_support import Config, capability, fitting, launch_chosen, on, processors
from dsa.ops.triton_tiles import TILE_DTYPES, padded_width, precision, product_dtype, split_width

SCRATCH_BYTES = 384 << 20
"""What the fp32 sums of the backward pass may take at once. Beyond that KV heads go in turns, then keys and values, and
in a fixed order queries."""

SHARING_BYTES = 128 << 20
"""What the tables of neighbouring queries' unions may take at once; blocks of queries go in turns beyond that."""

SHARING_ROWS = 1024
"""How many queries there must be before neighbours share tiles."""

LONGEST_UNION = 4
"""How many times `K` a union may be long: beyond, its tiles hold more masked products than the queries' own hold
padding."""

_MOST_SPLITS = 64

# Best guesses first. Tiles of 64 heads fill the matrix units of SM90; fewer heads leave room for more loads in flight.
_MANY_HEADS = (
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 32, "STAGES": 3, "num_warps": 8},
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 64, "STAGES": 2, "num_warps": 8},
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 32, "STAGES": 4, "num_warps": 8},
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 16, "STAGES": 2, "num_warps": 8},
    {"BLOCK_HEADS": 32, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 8},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 2, "num_warps": 4},
)
_FEW_HEADS = (
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 64, "STAGES": 3, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 4, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 128, "STAGES": 2, "num_warps": 8},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 2},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 2, "num_warps": 4},
)
_BACKWARD = (
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 64, "STAGES": 1, "num_warps": 8},
    {"BLOCK_HEADS": 32, "BLOCK_KEYS": 64, "STAGES": 1, "num_warps": 8},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 64, "STAGES": 2, "num_warps": 8},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 3, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 4},
)
_UNION = (
    {"BLOCK_KEYS": 64, "STAGES": 3, "num_warps": 4},
    {"BLOCK_KEYS": 128, "STAGES": 2, "num_warps": 4},
    {"BLOCK_KEYS": 64, "STAGES": 2, "num_warps": 4},
    {"BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 4},
)
# Three tf32 products each, whose operands take registers instead of shared memory.
_FLOAT32 = (
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 2, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 4},
)
# The backward pass keeps more tiles, and three products of each would not fit: it multiplies fp32 without matrix units.
_BACKWARD_FLOAT32 = ({"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 8},)


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
    shape = (heads, k.shape[2], *_shape_key(q, k, v), rows, indices.shape[-1])
    configs = _forward_candidates(q, k, v) if config is None else [config]
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
            *q.stride(), *k.stride(), *v.stride(), *indices.stride(),
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
    configs = _union_candidates(q, k, v, queries * padded_shared)
    for first in range(0, blocks, at_once):
        here = min(at_once, blocks - first)
        table = torch.zeros(here, keys, dtype=torch.int32, device=device)
        with on(device):
            mark[(here, queries)](
                indices, table, flags, *indices.stride(), tokens, keys, selected, blocks_of_row, first,
                QUERIES=queries, BLOCK=1024,
            )  # fmt: skip
            collect[(here,)](table, positions, members, counts, flags, keys, capacity, first, BLOCK=2048)

        def launch(config: Config, first: int = first, here: int = here) -> None:
            with on(device):
                attend_union[(here * groups,)](
                    q, k, v, positions, members, counts, flags, sink_logits, out, lse,
                    *q.stride(), *k.stride(), *v.stride(), tokens, keys, capacity, blocks_of_row, first,
                    scale, softcap or 1.0,
                    HEADS=heads, GROUPS=groups, SIZE=head_dim, OFFSETS=offsets, WIDTHS=widths,
                    V_SIZE=value_dim, V_OFFSETS=v_offsets, V_WIDTHS=v_widths,
                    HAS_SINK=sink_logits is not None, HAS_SOFTCAP=softcap is not None,
                    DTYPE=TILE_DTYPES[dtype], PRECISION=precision(dtype),
                    QUERIES=queries, PADDED_SHARED=padded_shared, **config,
                )  # fmt: skip

        shape = (heads, groups, *_shape_key(q, k, v))
        launch_chosen("sparse_attention shared", shape, configs, device, launch)
    return flags, queries


def backward(
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
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `q, k, v, sink_logits` in their dtypes, contiguous; without sinks the last one is empty.

    The gradients of keys and values are summed in fp32, by default atomically and so in an order that varies from run
    to run; `torch.use_deterministic_algorithms(True)` makes the order fixed, for more memory traffic.
    """
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sink_grad = q.new_empty(0) if sink_logits is None else torch.zeros_like(sink_logits)
    if not out.numel() or not k.shape[1] or not indices.shape[-1]:
        return grad_q, grad_k, grad_v, sink_grad
    delta = torch.empty_like(lse)

    def launch(config: Config) -> None:
        _launch_backward(
            grad_out, q, k, v, indices, sink_logits, out, lse, scale, softcap, grad_q, grad_k, grad_v, delta, config
        )  # fmt: skip

    shape = (q.shape[2], k.shape[2], *_shape_key(q, k, v), indices.shape[-1])
    configs = _backward_candidates(q, k, v) if config is None else [config]
    launch_chosen("sparse_attention backward", shape, configs, q.device, launch)
    if sink_logits is not None:
        logits = sink_logits.float()
        share = (logits - torch.logaddexp(lse, logits)).exp()
        sink_grad = -(share * delta).sum(dim=(0, 1)).to(sink_logits.dtype)
    return grad_q, grad_k, grad_v, sink_grad


def _launch_backward(
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
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    delta: Tensor,
    config: Config,
) -> None:
    batch, tokens, heads, head_dim = q.shape
    keys, groups = k.shape[1:3]
    rows, value_dim, selected = batch * tokens, v.shape[-1], indices.shape[-1]
    head_blocks = triton.cdiv(heads // groups, config["BLOCK_HEADS"])
    # The query gradient of a wide head fills the registers; what is left holds parts of 64 columns of the others.
    widest = 64 if head_dim > 256 else 128
    offsets, widths = split_width(head_dim, widest)
    v_offsets, v_widths = split_width(value_dim, widest)
    dtype = product_dtype(q, k, v)
    deterministic = torch.are_deterministic_algorithms_enabled()
    # 4 bytes for every column of a key and its value.
    per_group = 4 * batch * keys * (head_dim + value_dim)
    groups_at_once = max(1, min(groups, SCRATCH_BYTES // per_group))
    # One latent row cannot be split by heads: its gradients as key and as value take a sweep each.
    sweeps = [("k", "v")] if per_group <= SCRATCH_BYTES else [("k",), ("v",)]
    sizes, results = {"k": head_dim, "v": value_dim}, {"k": grad_k, "v": grad_v}
    for first_group in range(0, groups, groups_at_once):
        here = min(groups_at_once, groups - first_group)
        for wanted in sweeps:
            sums = {
                name: torch.zeros(batch, keys, here, sizes[name], dtype=torch.float32, device=q.device)
                for name in wanted
            }
            rows_at_once = rows
            if deterministic:
                per_row = 4 * groups_at_once * head_blocks * selected * sum(sizes[name] for name in wanted)
                rows_at_once = max(1, min(rows, SCRATCH_BYTES // 3 // per_row))
            for first_row in range(0, rows, rows_at_once):
                rows_here = min(rows_at_once, rows - first_row)
                programs = rows_here * here * head_blocks
                targets = sums
                if deterministic:
                    targets = {
                        name: torch.empty(programs, selected, sizes[name], dtype=torch.float32, device=q.device)
                        for name in wanted
                    }
                with on(q.device):
                    attend_backward[(programs,)](
                        q, k, v, indices, sink_logits, out, lse, grad_out, grad_q,
                        targets.get("k", delta), targets.get("v", delta), delta,
                        *q.stride(), *k.stride(), *v.stride(), *indices.stride(), *grad_out.stride(),
                        tokens, keys, selected, first_row, first_group, scale, softcap or 1.0,
                        HEADS=heads, GROUPS=groups, GROUPS_HERE=here, SIZE=head_dim, OFFSETS=offsets, WIDTHS=widths,
                        V_SIZE=value_dim, V_OFFSETS=v_offsets, V_WIDTHS=v_widths,
                        VALUES_IN_KEYS=values_in_keys(k, v, widest),
                        HAS_SINK=sink_logits is not None, HAS_SOFTCAP=softcap is not None, DETERMINISTIC=deterministic,
                        WITH_KEYS="k" in wanted, WITH_VALUES="v" in wanted,
                        DTYPE=TILE_DTYPES[dtype], PRECISION="ieee", **config,
                    )  # fmt: skip
                    if deterministic:
                        pairs = zip(targets.values(), sums.values())
                        _sum_in_order(indices, first_row, rows_here, here, head_blocks, keys, pairs)
                        targets.clear()
            for name in wanted:
                # Let go before the next sweep allocates its own.
                results[name][:, :, first_group : first_group + here] = sums.pop(name)


def _sum_in_order(
    indices: Tensor,
    first_row: int,
    rows: int,
    groups: int,
    head_blocks: int,
    keys: int,
    pairs: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Adds contributions `[programs, K, D]` of some rows to sums `[B, S, groups, D]`, in the order of the rows."""
    batch, tokens, selected = indices.shape
    device = indices.device
    row = torch.arange(first_row, first_row + rows, device=device)
    chosen = indices[row // tokens, row % tokens].long()
    sentinel = batch * keys * groups
    places = (row // tokens)[:, None] * keys + chosen
    places = places[:, None] * groups + torch.arange(groups, device=device)[:, None]
    places.masked_fill_(((chosen < 0) | (chosen >= keys))[:, None], sentinel)
    # [rows, groups, head blocks, K]: the order in which programs are numbered.
    places = places[:, :, None].expand(rows, groups, head_blocks, selected).reshape(-1)
    places, order = places.sort(stable=True)
    for source, total in pairs:
        size = total.shape[-1]
        block = min(128, triton.next_power_of_2(size))
        sum_by_key[(places.numel(), triton.cdiv(size, block))](
            source, order, places, total, places.numel(), sentinel, SIZE=size, BLOCK=block
        )


def split_count(programs: int, selected: int, block_keys: int, device: torch.device) -> int:
    """Into how many parts a selection is cut so that about four programs run on every multiprocessor."""
    if device.type != "cuda":
        return 1
    available = processors(device.index or 0)
    if programs >= 2 * available:
        return 1
    return max(1, min(triton.cdiv(selected, block_keys), triton.cdiv(4 * available, programs), _MOST_SPLITS))


def values_in_keys(k: Tensor, v: Tensor, widest: int) -> bool:
    """Whether `v` is a view of the first columns of `k` and covers whole parts, so that its tiles are those of `k`."""
    if v.data_ptr() != k.data_ptr() or v.dtype != k.dtype or v.stride() != k.stride():
        return False
    _, widths = split_width(v.shape[-1], widest)
    return sum(widths) == v.shape[-1] and split_width(k.shape[-1], widest)[1][: len(widths)] == widths


def _forward_candidates(q: Tensor, k: Tensor, v: Tensor) -> list[Config]:
    """Those whose queries, gathered rows in flight and probabilities fit shared memory."""
    itemsize = product_dtype(q, k, v).itemsize
    columns, gathered = padded_width(q.shape[-1]), _gathered_width(k, v)

    def bytes_of(config: Config) -> int:
        rows, places = config["BLOCK_HEADS"], config["BLOCK_KEYS"]
        return itemsize * (rows * (columns + places) + config["STAGES"] * places * gathered)

    if itemsize == 4:
        return fitting(_FLOAT32, bytes_of, q.device)
    return fitting(_FEW_HEADS if q.shape[2] // k.shape[2] <= 16 else _MANY_HEADS, bytes_of, q.device)


def _backward_candidates(q: Tensor, k: Tensor, v: Tensor) -> list[Config]:
    """Those whose queries, upstream gradients, gathered rows and probabilities fit shared memory."""
    itemsize = product_dtype(q, k, v).itemsize
    columns, gathered = padded_width(q.shape[-1]) + padded_width(v.shape[-1]), _gathered_width(k, v)
    most_heads = max(16, triton.next_power_of_2(q.shape[2] // k.shape[2]))

    def bytes_of(config: Config) -> int:
        rows, places = config["BLOCK_HEADS"], config["BLOCK_KEYS"]
        # SM90's matrix unit takes sides of 64. Where only some products have them, the tiles are kept in two layouts.
        copies = 2 if (rows >= 64) != (places >= 64) else 1
        flying = config["STAGES"] if max(rows, places) >= 64 else max(1, config["STAGES"] - 1)
        return itemsize * (copies * rows * columns + flying * places * gathered + 64 * 64)

    if itemsize == 4:
        return fitting(_BACKWARD_FLOAT32, bytes_of, q.device)
    return fitting([c for c in _BACKWARD if c["BLOCK_HEADS"] <= most_heads], bytes_of, q.device)


def _union_candidates(q: Tensor, k: Tensor, v: Tensor, rows: int) -> list[Config]:
    """Those whose queries, gathered rows in flight and probabilities fit shared memory."""
    itemsize, columns = product_dtype(q, k, v).itemsize, padded_width(q.shape[-1])
    gathered = columns + padded_width(v.shape[-1])

    def bytes_of(config: Config) -> int:
        places = config["BLOCK_KEYS"]
        return itemsize * (rows * (columns + places) + config["STAGES"] * places * gathered)

    return fitting(_UNION, bytes_of, q.device)


def _gathered_width(k: Tensor, v: Tensor) -> int:
    """Columns read for every selected token."""
    return padded_width(k.shape[-1]) + (0 if values_in_keys(k, v, 512) else padded_width(v.shape[-1]))


def _shape_key(q: Tensor, k: Tensor, v: Tensor) -> tuple[object, ...]:
    return str(product_dtype(q, k, v)), q.shape[-1], v.shape[-1], values_in_keys(k, v, 512)
