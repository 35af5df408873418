"""`indexer_loss` through the compiled kernels. How they work: README.md.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `H`/`G` query / KV heads,
`D` head dim, `K` selected tokens.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsa.ops import native_support
from dsa.ops.ranges import VisibleRanges


class Constants(NamedTuple):
    """All but the index tensors; the arguments of `api.indexer_loss`, with the ranges made from them."""

    q: Tensor
    k: Tensor
    sink_logits: Tensor | None
    indices: Tensor | None
    index_scale: float
    attention_scale: float
    softcap: float | None
    visible: VisibleRanges
    sinks: int
    local: int


_pack_scalars = struct.Struct("=2q3fi").pack
"""What follows the tensors in `dsa_indexer_loss_args`: sinks, local, index scale, attention scale, softcap, threads."""


class IndexerLoss(torch.autograd.Function):
    """The kernel computes loss and gradients in one go; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, q_index: Tensor, k_index: Tensor, w_index: Tensor, constants: Constants) -> Tensor:
        wanted = any(ctx.needs_input_grad[:3])
        loss, grads = loss_and_gradients(q_index, k_index, w_index, constants, wanted)
        if wanted:
            ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            grad * grad_loss.to(grad.dtype) if needed else None
            for grad, needed in zip(ctx.saved_tensors, ctx.needs_input_grad)
        )
        return (*grads, None)


def indexer_loss(q_index: Tensor, k_index: Tensor, w_index: Tensor, constants: Constants) -> Tensor:
    """Scalar fp32; everything validated and resolved."""
    return IndexerLoss.apply(q_index, k_index, w_index, constants)


def loss_and_gradients(
    q_index: Tensor, k_index: Tensor, w_index: Tensor, constants: Constants, wanted: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and, where wanted, its gradients by the three index tensors, in their dtypes."""
    index = (q_index, k_index, w_index)
    batch, tokens = q_index.shape[:2]
    selected = 1 if constants.indices is None else constants.indices.shape[-1]
    if not batch * tokens * k_index.shape[1] * selected:
        return torch.zeros(()), tuple(torch.zeros_like(x) for x in index if wanted)
    loss = torch.empty(1, dtype=torch.float32)
    grads = tuple(torch.empty(x.shape, dtype=torch.float32) for x in index) if wanted else (None, None, None)
    sinks = None if constants.sink_logits is None else constants.sink_logits.float()
    indices = None if constants.indices is None else constants.indices.int()
    visible = constants.visible
    key_start, key_end = visible.host_start.int(), visible.host_end.int()
    tensors = (*index, constants.q, constants.k, sinks, indices, key_start, key_end, loss, *grads)
    scalars = _pack_scalars(
        constants.sinks,
        constants.local,
        constants.index_scale,
        constants.attention_scale,
        constants.softcap or 0.0,
        native_support.threads(),
    )
    native_support.call("indexer_loss", native_support.pack(*tensors) + scalars)
    return loss[0], tuple(grad.to(x.dtype) for grad, x in zip(grads, index) if grad is not None)
