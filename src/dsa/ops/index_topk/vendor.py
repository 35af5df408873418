"""`index_topk` with the scores of DeepGEMM, where that library is installed; the selection is torch's.

The library stores the scores of a block of queries against all their keys, so blocks are made that fit the budget of
the device. Queries are rounded to e4m3 with a scale for each token and head, as the Triton kernels do. The selection is
the exact top-k of the scores that the library computes, with the rule for ties of the reference.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `K` top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa.ops import vendor_support
from dsa.ops.index_topk.selection import crowded_rows, select_by_blocks
from dsa.ops.quantize.reference import rotate, round_to_fp8
from dsa.ops.quantize.types import QuantizedKeys
from dsa.ops.ranges import Block, VisibleRanges

LIBRARY = "deep_gemm"

_DIMS = (32, 64, 128)
_HEADS = (32, 64)
_TOLERANCE = 0.01


def gap(q: Tensor, k: object) -> str | None:
    """Why the library cannot score this input, or `None` where it can."""
    reason = vendor_support.device_gap(LIBRARY, q.device)
    if reason is not None:
        return reason
    if not isinstance(k, QuantizedKeys) or k.dtype != "fp8":
        return f"{LIBRARY} scores fp8 keys in one piece"
    if q.shape[2] not in _HEADS or q.shape[3] not in _DIMS:
        return f"{LIBRARY} takes {' or '.join(map(str, _HEADS))} index heads of {', '.join(map(str, _DIMS))} dims"
    heads, dim, device = q.shape[2], q.shape[3], q.device
    return vendor_support.once(LIBRARY, (heads, dim), device, lambda: _check(device, heads, dim))


def _check(device: torch.device, heads: int, dim: int) -> None:
    """Asks the library a small question and compares the answer with fp32.

    Raises:
        RuntimeError: It refuses, or answers wrongly.
    """
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(1, 64, heads, dim, generator=generator, device=device)
    key, key_scale = round_to_fp8(torch.randn(1, 256, dim, generator=generator, device=device))
    weight = torch.randn(1, 64, heads, generator=generator, device=device)
    code, query_scale = round_to_fp8(q)
    limits = torch.zeros(64, dtype=torch.int32, device=device), torch.full((64,), 256, dtype=torch.int32, device=device)
    found = _logits(code[0], key[0], key_scale[0], (weight * query_scale)[0], *limits)
    dots = torch.einsum("thd,sd->ths", code[0].float(), key[0].float()).relu()
    expected = torch.einsum("ths,th->ts", dots, (weight * query_scale)[0]) * key_scale[0]
    if found.shape != expected.shape or not vendor_support.close(found, expected, _TOLERANCE):
        raise RuntimeError("it gave other scores than the indexer's on a small question")


def _logits(q: Tensor, key: Tensor, key_scale: Tensor, weight: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """fp32 `[n, s]` for `q[n, Hi, Di]`, `key[s, Di]` in e4m3; what a query does not see is undefined."""
    library = vendor_support.load(LIBRARY)
    keys = key.contiguous(), key_scale.contiguous()
    return library.fp8_mqa_logits(q.contiguous(), keys, weight.contiguous(), first, last, False)


def index_topk(
    q: Tensor, k: QuantizedKeys, w: Tensor, top_k: int, *, scale: float, sinks: int, local: int, ranges: VisibleRanges
) -> Tensor:
    """int32 `[B, T, K]`; arguments as in `api.index_topk`, validated and resolved, within `gap`."""
    rows = crowded_rows(ranges, top_k)
    visible, rows = ranges.select(rows), rows.to(q.device)
    code, query_scale = round_to_fp8(rotate(q[:, rows]))
    weight = (w[:, rows].float() * query_scale) * scale

    def score(block: Block) -> Tensor:
        columns, found = block.columns, []
        for b in range(q.shape[0]):
            first, last = (
                (edge[b, block.rows] - columns.start).clamp(0, block.width).int()
                for edge in (visible.start, visible.end)
            )
            queries = code[b, block.rows], weight[b, block.rows]
            found.append(_logits(queries[0], k.data[b, columns], k.scale[b, columns], queries[1], first, last))
        return torch.stack(found)

    # Scores, their ordered keys and two masks.
    return select_by_blocks(ranges, top_k, sinks, local, score, bytes_per_pair=12 * q.shape[0])
