"""Attention over selected tokens through the compiled kernels, and its gradients.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys /
values, `K` selected tokens.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsa.ops import native_support
from dsa.ops.checks import check_indices
from dsa.ops.packed_latents.types import PackedLatents

_OP = "sparse_attention"


_pack_scalars = struct.Struct("=Q2fi4x").pack
"""What follows the tensors in `dsa_sparse_attention_args`: where to say that an index lies outside, scale, softcap,
threads."""

_pack_packed_scalars = struct.Struct("=Q2f2i").pack
"""What follows the tensors in `dsa_packed_attention_args`: where to say that an index lies outside, scale, softcap,
latent dims, threads."""

_pack_backward_scalars = struct.Struct("=2fi4x").pack
"""What follows the tensors in `dsa_sparse_attention_backward_args`: scale, softcap, threads."""


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
    """Arguments as in `api.sparse_attention`, validated but for the values of `indices`, which are checked here."""
    if indices.dtype != torch.int32:
        check_indices(_OP, indices, k.shape[1])
        indices = indices.int()
    # The kernels want each row in one piece. It is, but for rare views, and no other stride matters.
    k, v, indices = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v, indices))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sink_logits)):
        return _SparseAttention.apply(q, k, v, indices, sink_logits, scale, softcap or 0.0)
    if torch.compiler.is_compiling():
        return _in_graph(q, k, v, indices, sink_logits, scale, softcap or 0.0)
    return _forward(q, k, v, indices, sink_logits, scale, softcap or 0.0)


def packed_attention(
    q: Tensor,
    rows: PackedLatents,
    indices: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same over FP8 rows, without gradients."""
    if indices.dtype != torch.int32:
        check_indices(_OP, indices, rows.shape[1])
        indices = indices.int()
    data, indices = (x if x.stride(-1) == 1 else x.contiguous() for x in (rows.data, indices))
    out = torch.empty((*q.shape[:3], rows.latent_dim), dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    outside = ctypes.c_int32(0)
    scalars = _pack_packed_scalars(
        ctypes.addressof(outside), scale, softcap or 0.0, rows.latent_dim, native_support.threads()
    )
    tensors = native_support.pack(q, data.view(torch.int8), indices, sink_logits, out, lse)
    native_support.call("packed_attention", tensors + scalars)
    if outside.value:
        check_indices(_OP, indices, rows.shape[1])
        raise AssertionError("the kernel and check_indices disagree")
    return out, lse


@native_support.graph_operation(
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? sink_logits, float scale, float softcap) "
    "-> (Tensor, Tensor)"
)
def _in_graph(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, sink_logits: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, indices, sink_logits, scale, softcap)


@_in_graph.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, sink_logits: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, sink_logits: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    outside = ctypes.c_int32(0)
    scalars = _pack_scalars(ctypes.addressof(outside), scale, softcap, native_support.threads())
    native_support.call(_OP, native_support.pack(q, k, v, indices, sink_logits, out, lse) + scalars)
    if outside.value:
        # The kernel has read nothing there and seen only that it would have had to: this says what came.
        check_indices(_OP, indices, k.shape[1])
        raise AssertionError("the kernel and check_indices disagree")
    return out, lse


class _SparseAttention(torch.autograd.Function):
    """Keeps the inputs and `lse`; the backward pass recomputes the weights from them."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        sink_logits: Tensor | None,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, indices, sink_logits, scale, softcap)
        ctx.save_for_backward(q, k, v, indices, sink_logits, lse)
        ctx.scale, ctx.softcap = scale, softcap
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, indices, sink_logits, lse = ctx.saved_tensors
        wanted = dict(zip(("q", "k", "v", "indices", "sink"), ctx.needs_input_grad))
        grad_q = torch.empty(q.shape, dtype=q.dtype) if wanted["q"] else None
        grad_k = torch.empty(k.shape, dtype=torch.float32) if wanted["k"] else None
        grad_v = torch.empty(v.shape, dtype=torch.float32) if wanted["v"] else None
        grad_sink = torch.empty(q.shape[2], dtype=torch.float32) if wanted["sink"] else None
        tensors = (q, k, v, indices, sink_logits, lse, grad_out, grad_q, grad_k, grad_v, grad_sink)
        scalars = _pack_backward_scalars(ctx.scale, ctx.softcap, native_support.threads())
        native_support.call(f"{_OP}_backward", native_support.pack(*tensors) + scalars)
        return (
            grad_q,
            None if grad_k is None else grad_k.to(k.dtype),
            None if grad_v is None else grad_v.to(v.dtype),
            None,
            None if grad_sink is None else grad_sink.to(sink_logits.dtype),
            None,
            None,
        )
