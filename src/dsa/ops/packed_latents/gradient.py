"""FP8 rows pass no gradient, and a backward pass must not go on in silence as if there were none to pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def without_gradient(out: Tensor, *inputs: Tensor | None) -> Tensor:
    """`out`, made from FP8 rows and `inputs`; where those have gradients, a backward pass through it raises.

    Raises:
        NotImplementedError: In the backward pass.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _WithoutGradient.apply(out, *inputs)
    return out


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor | None) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "FP8 rows pass no gradient; train with k and v as tensors (a model: without a cache, use_cache=False)"
        )
