"""Attention over all visible tokens through the compiled kernels. How they work: README.md.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsa.ops import native_support


class Options(NamedTuple):
    """What is not differentiated: the factor on `q . k`, the softcap if any, and what each query sees.

    The ranges are int32 `[B, T]` within `[0, S]`; `None` for the causal defaults.
    """

    scale: float
    softcap: float | None
    key_start: Tensor | None
    key_end: Tensor | None


_pack_scalars = struct.Struct("=2fi4x").pack
"""What follows the tensors in `dsa_dense_attention_args`: scale, softcap, threads."""


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, out: Tensor, lse: Tensor, options: Options
) -> bytes:
    """`dsa_dense_attention_args`, with which `dsa_dense_attention_backward_args` begins too."""
    tensors = native_support.pack(q, k, v, sink_logits, options.key_start, options.key_end, out, lse)
    return tensors + _pack_scalars(options.scale, options.softcap or 0.0, native_support.threads())


class DenseAttention(torch.autograd.Function):
    """The backward pass recomputes the probabilities from `lse`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, sink_logits, options)
        ctx.save_for_backward(q, k, v, sink_logits, out, lse)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink_logits, out, lse = ctx.saved_tensors
        for_q, for_k, for_v, for_sink = ctx.needs_input_grad[:4]
        sink = None if sink_logits is None else sink_logits.float()
        normaliser = lse if sink is None else torch.logaddexp(lse, sink)
        mean = torch.empty_like(lse)
        grads = [
            torch.empty(x.shape, dtype=x.dtype) if wanted else None
            for x, wanted in zip((q, k, v), (for_q, for_k, for_v))
        ]
        forward = _arguments(q, k, v, sink, out, lse, ctx.options)
        native_support.call(
            "dense_attention_backward", forward + native_support.pack(grad_out, normaliser, mean, *grads)
        )
        grad_sink = None
        if for_sink and sink is not None:
            share = (sink - normaliser.masked_fill(normaliser == -torch.inf, 0.0)).exp()
            grad_sink = -(share * mean).sum(dim=(0, 1)).to(sink_logits.dtype)
        return (*grads, grad_sink, None)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, sink_logits: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Arguments as in `api.dense_attention`, validated; without gradients nothing is kept for a backward pass."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sink_logits)):
        return DenseAttention.apply(q, k, v, sink_logits, options)
    if torch.compiler.is_compiling():
        return _in_graph(q, k, v, sink_logits, options.key_start, options.key_end, options.scale, options.softcap)
    return _forward(q, k, v, sink_logits, options)


@native_support.graph_operation(
    "dense_attention(Tensor q, Tensor k, Tensor v, Tensor? sink_logits, Tensor? key_start, Tensor? key_end, "
    "float scale, float? softcap) -> (Tensor, Tensor)"
)
def _in_graph(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, sink_logits, Options(scale, softcap, key_start, key_end))


@_in_graph.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


def _forward(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    out = torch.empty((batch, tokens, heads, v.shape[-1]), dtype=q.dtype)
    lse = torch.empty((batch, tokens, heads), dtype=torch.float32)
    sink = None if sink_logits is None else sink_logits.detach().float()
    native_support.call("dense_attention", _arguments(q, k, v, sink, out, lse, options))
    return out, lse
