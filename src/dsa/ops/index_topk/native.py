"""`index_topk` through the compiled kernel.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `Gs` selections of a query,
`K` top-k. The dim `Gs` is there where the weights have it.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from dsa.ops import native_support
from dsa.ops.blocks import full_precision
from dsa.ops.checks import check_tensor
from dsa.ops.quantize.reference import rotate
from dsa.ops.quantize.types import QuantizedKeys
from dsa.ops.ranges import resolve_ranges

_OP = "index_topk"


_pack_scalars = struct.Struct("=f3i").pack
"""What follows the tensors in `dsa_index_topk_args`: scale, sinks, local, threads."""


def index_topk(
    q: Tensor,
    k: Tensor | QuantizedKeys,
    w: Tensor,
    top_k: int,
    *,
    scale: float,
    sinks: int,
    local: int,
    key_start: Tensor | None,
    key_end: Tensor | None,
) -> Tensor:
    """int32 `[B, T, (Gs,) K]`; arguments as in `api.index_topk`, validated but for the ranges."""
    key, key_scale = (k.data, k.scale) if isinstance(k, QuantizedKeys) else (k, None)
    if key.dtype == torch.float8_e4m3fn:
        # int8 queries are rotated in the kernel, where they are quantised; these are not quantised.
        with full_precision(q.device):
            q = rotate(q.detach())
    if torch.compiler.is_compiling():
        return _in_graph(q, key, key_scale, w, key_start, key_end, top_k, scale, sinks, local)
    return _select(q, key, key_scale, w, key_start, key_end, top_k, scale, sinks, local)


@native_support.graph_operation(
    "index_topk(Tensor q, Tensor key, Tensor? key_scale, Tensor w, Tensor? key_start, Tensor? key_end, int top_k, "
    "float scale, int sinks, int local) -> Tensor"
)
def _in_graph(
    q: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    w: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    top_k: int,
    scale: float,
    sinks: int,
    local: int,
) -> Tensor:
    return _select(q, key, key_scale, w, key_start, key_end, top_k, scale, sinks, local)


@_in_graph.register_fake
def _(
    q: Tensor, key: Tensor, key_scale: Tensor | None, w: Tensor, start: Tensor | None, end: Tensor | None, top_k: int,
    *_: object,
) -> Tensor:  # fmt: skip
    return q.new_empty((*w.shape[:-1], top_k), dtype=torch.int32)


def _select(
    q: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    w: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    top_k: int,
    scale: float,
    sinks: int,
    local: int,
) -> Tensor:
    batch, tokens = q.shape[:2]
    keys = key.shape[1]
    start = _range("key_start", key_start, batch, tokens, keys)
    end = _range("key_end", key_end, batch, tokens, keys)
    selection = torch.empty(*w.shape[:-1], top_k, dtype=torch.int32)
    scalars = _pack_scalars(scale, sinks, local, native_support.threads())
    arguments = native_support.pack(q, key, key_scale, w, start, end, selection) + scalars
    try:
        native_support.call(_OP, arguments)
    except native_support.OutOfRange:
        # The kernel looks at the ranges before it reads anything through them; the reference has the words for it.
        resolve_ranges(_OP, key_start, key_end, batch, tokens, keys, q.device)
        raise
    return selection


def _range(name: str, bound: Tensor | None, batch: int, tokens: int, keys: int) -> Tensor | None:
    """One end of the visible ranges in int32, in which a value that lies outside stays outside."""
    if bound is None:
        return None
    check_tensor(_OP, name, bound, "[B, T]", (batch, tokens), device=torch.device("cpu"), integer=True)
    return bound if bound.dtype == torch.int32 else bound.clamp(-1, keys + 1).int()
