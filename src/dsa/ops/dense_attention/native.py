"""Attention over all visible tokens through the compiled kernels. How they work: README.md.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsa.ops import native_support
from dsa.ops.native_support import TensorArg


class Options(NamedTuple):
    """What is not differentiated: the factor on `q . k`, the softcap if any, and what each query sees.

    The ranges are int32 `[B, T]` within `[0, S]`; `None` for the causal defaults.
    """

    scale: float
    softcap: float | None
    key_start: Tensor | None
    key_end: Tensor | None


class _Arguments(ctypes.Structure):
    """`dsa_dense_attention_args` of `csrc/include/dsa/dense_attention.h`."""

    _fields_ = (
        ("q", TensorArg),
        ("k", TensorArg),
        ("v", TensorArg),
        ("sink_logits", TensorArg),
        ("key_start", TensorArg),
        ("key_end", TensorArg),
        ("out", TensorArg),
        ("lse", TensorArg),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, out: Tensor, lse: Tensor, options: Options
    ) -> _Arguments:
        tensors = (q, k, v, sink_logits, options.key_start, options.key_end, out, lse)
        return cls(
            *(TensorArg.of(tensor) for tensor in tensors),
            options.scale,
            options.softcap or 0.0,
            native_support.threads(),
        )


class _BackwardArguments(ctypes.Structure):
    """`dsa_dense_attention_backward_args` of `csrc/include/dsa/dense_attention.h`."""

    _fields_ = (
        ("forward", _Arguments),
        ("grad_out", TensorArg),
        ("normaliser", TensorArg),
        ("mean", TensorArg),
        ("grad_q", TensorArg),
        ("grad_k", TensorArg),
        ("grad_v", TensorArg),
    )


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
        arguments = _BackwardArguments(
            _Arguments.of(q, k, v, sink, out, lse, ctx.options),
            *(TensorArg.of(tensor) for tensor in (grad_out, normaliser, mean, *grads)),
        )
        native_support.call("dense_attention_backward", arguments)
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
    return _forward(q, k, v, sink_logits, options)


def _forward(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    out = torch.empty((batch, tokens, heads, v.shape[-1]), dtype=q.dtype)
    lse = torch.empty((batch, tokens, heads), dtype=torch.float32)
    sink = None if sink_logits is None else sink_logits.detach().float()
    native_support.call("dense_attention", _Arguments.of(q, k, v, sink, out, lse, options))
    return out, lse
