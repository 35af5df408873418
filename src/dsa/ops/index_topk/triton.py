"""Lightning indexer and exact top-k selection on GPUs, without a matrix of scores.

A chunk of queries goes through the keys in rounds, from the newest it sees to the oldest:

1. `score_kernel` scores one round. Of each row only what exceeds the row's bound is kept, with its position, in
   segments that hold a whole round if they must, so that no input overflows them.
2. `select_kernel` merges that with the best `K` so far, keeps the best `K` of both in order of age, and raises the
   bound to (at least) a value that `K` of them reach. Older tokens lose against equal newer ones, so what comes later
   must exceed it. After the last round the best `K` are the selection, already sorted.

The bound of the first round is nothing, so all its ordered keys are stored: the round is short, unless there are so
few rows that one round can take all keys (decoding); then groups of keys are selected side by side and merged.

With int8 keys the scores, and so the selection, are those of the reference bit for bit. With fp8 keys the queries
are rounded to e4m3 too, with one scale per token and head, as the matrix units need (the reference leaves them in
fp32); bf16 and fp16 products are summed in fp32. There the selection is the exact top-k of the scores that the kernel
computes.

Memory beyond the result: 384 MB of candidates at most, and queries in eight bits for one chunk.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `K` top-k. A row is one
query of a chunk; an extent is the number of keys between the first and the last that a block of rows sees.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from dsa.ops import triton_support
from dsa.ops.index_topk.triton_kernels import fill_kernel
from dsa.ops.index_topk.triton_rounds import Chunk, Limits, Operands
from dsa.ops.paging.types import PagedKeys
from dsa.ops.quantize.triton import quantize_weighted_queries
from dsa.ops.quantize.types import QuantizedKeys
from dsa.ops.ranges import VisibleRanges, ranges_for_kernels

Keys = Tensor | QuantizedKeys | PagedKeys


def index_topk(
    q: Tensor,
    k: Keys,
    w: Tensor,
    top_k: int,
    *,
    scale: float,
    sinks: int,
    local: int,
    key_start: Tensor | None,
    key_end: Tensor | None,
) -> Tensor:
    """int32 `[B, T, K]`; arguments as in `api.index_topk`, validated but for the ranges.

    One operator to `torch.compile`. A CUDA graph can capture it; given ranges are then neither checked nor read, and
    all keys are gone through. Keys in pages are read through the block table; a page outside the pool is not read,
    its tokens score 0.
    """
    if isinstance(k, PagedKeys):
        return _index_topk(
            q, k.pages, None, k.block_table, w, key_start, key_end, k.shape[1], k.dtype, top_k, scale, sinks, local
        )
    key, key_scale = (k.data, k.scale) if isinstance(k, QuantizedKeys) else (k, None)
    return _index_topk(q, key, key_scale, None, w, key_start, key_end, k.shape[1], "", top_k, scale, sinks, local)


@torch.library.custom_op("dsa::index_topk_triton", mutates_args=())
def _index_topk(
    q: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    block_table: Tensor | None,
    w: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    keys: int,
    page_dtype: str,
    top_k: int,
    scale: float,
    sinks: int,
    local: int,
) -> Tensor:
    k: Keys = key if key_scale is None else QuantizedKeys(key, key_scale)
    if block_table is not None:
        k = PagedKeys(key, block_table, keys, "int8" if page_dtype == "int8" else "fp8")
    ranges = ranges_for_kernels("index_topk", key_start, key_end, q.shape[0], q.shape[1], keys, q.device)
    return select(q, k, w, top_k, scale=scale, sinks=sinks, local=local, ranges=ranges)


@_index_topk.register_fake
def _(
    q: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    block_table: Tensor | None,
    w: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    keys: int,
    page_dtype: str,
    top_k: int,
    scale: float,
    sinks: int,
    local: int,
) -> Tensor:
    return torch.empty(q.shape[0], q.shape[1], top_k, dtype=torch.int32, device=q.device)


def select(
    q: Tensor,
    k: Keys,
    w: Tensor,
    top_k: int,
    *,
    scale: float,
    sinks: int,
    local: int,
    ranges: VisibleRanges,
    limits: Limits | None = None,
) -> Tensor:
    """int32 `[B, T, K]`; arguments as in `api.index_topk`, validated and resolved."""
    batch, tokens = q.shape[:2]
    selection = torch.empty(batch, tokens, top_k, dtype=torch.int32, device=q.device)
    if not selection.numel():
        return selection
    limits = limits or Limits()
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        fill_kernel[(tokens, batch)](
            ranges.start, ranges.end, selection, top_k, ranges.start.stride(), ranges.end.stride(), tokens * top_k,
            BLOCK=min(1024, triton.next_power_of_2(top_k)),
        )  # fmt: skip
        # Twice 2 K for the first round and the kept, at the least; so places fit 32 bits whatever K.
        most = max(1, min(limits.rows, limits.candidates // (4 * top_k)))
        for rows in _chunks(batch, tokens, most):
            if (ranges.host_end[rows] - ranges.host_start[rows] > top_k).any():
                operands = _operands(q[rows], _of_batch(k, rows[0]), w[rows], scale)
                Chunk(operands, top_k, sinks, local, ranges, rows, limits).select(selection[rows])
    return selection


def _chunks(batch: int, tokens: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Splits batch and query tokens into chunks of at most `rows` rows."""
    batch_step = min(batch, rows)
    token_step = max(1, rows // batch_step)
    for b in range(0, batch, batch_step):
        for t in range(0, tokens, token_step):
            yield slice(b, b + batch_step), slice(t, t + token_step)


def _of_batch(k: Keys, batch: slice) -> Keys:
    """The keys of some batch rows."""
    if isinstance(k, PagedKeys):
        return PagedKeys(k.pages, k.block_table[batch], k.tokens, k.dtype)
    return k[batch]


def _operands(q: Tensor, k: Keys, w: Tensor, scale: float) -> Operands:
    if isinstance(k, QuantizedKeys | PagedKeys):
        query, coefficient = quantize_weighted_queries(q, w, scale, k.dtype)
        query = query.transpose(1, 2)
        data, key_scale = k.parts() if isinstance(k, PagedKeys) else (k.data, k.scale)
        table = k.block_table if isinstance(k, PagedKeys) else None
        if k.dtype == "int8":
            return Operands("int8", query, data.view(torch.int8), coefficient, key_scale, table)
        if triton_support.has_fp8(q.device):
            query, data = query.view(torch.float8_e4m3fn), data.view(torch.float8_e4m3fn)
            return Operands("fp8", query, data, coefficient, key_scale, table)
        return Operands("fp8_as_fp16", query, data.view(torch.uint8), coefficient, key_scale, table)
    narrow = q.dtype == k.dtype and q.dtype.itemsize == 2
    # The interpreter cannot multiply bf16; widened, the products are the same.
    kind = "half" if narrow and not (triton_support.interpreted() and q.dtype == torch.bfloat16) else "fp32"
    if q.stride(2) * q.shape[2] >= 1 << 31:
        # The kernel steps from head to head in 32 bits.
        q = q.contiguous()
    return Operands(kind, q, k, (w.float() * scale).transpose(1, 2).contiguous(), None)
