"""Products with packed weights, and rows of them. Semantics: README.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsa.ops import native_support
from dsa.ops.checks import check_tensor
from dsa.ops.packed_linear import reference
from dsa.ops.packed_linear.types import PackedWeight
from dsa.ops.types import Impl, resolve_impl

_GRADIENT_NUMBERS = 1 << 24
"""Weights that are widened at a time for the gradient: 64 MB."""


def packed_linear(input: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """`input @ weight.T + bias` with activations rounded to eight bits in groups of 32 columns.

    The input's gradient is that of the product with the weights as they are, the rounding of activations passed over;
    the bias gets its own, the weights get none.

    Shapes: `N` rows (features out), `C` columns (features in).

    Args:
        input: `[..., C]`, floating-point.
        weight: `[N, C]`.
        bias: `[N]`.
        impl: Which implementation runs; an explicit choice never falls back.

    Returns:
        `[..., N]` in the dtype of the input; summed in fp32, or fp64.

    Raises:
        TypeError: Not floating-point tensors.
        ValueError: Shapes or devices that do not fit together.
        NotImplementedError: The implementation asked for cannot run this input.
    """
    if input.ndim == 0 or input.shape[-1] != weight.columns or not input.is_floating_point():
        check_tensor("packed_linear", "input", input, "[..., C]", (*input.shape[:-1], weight.columns))
    if bias is not None:
        check_tensor("packed_linear", "bias", bias, "[N]", (weight.rows,), device=input.device)
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        return _Product.apply(input, weight, bias, impl)
    return _product(input, weight, bias, impl)


def packed_rows(weight: PackedWeight, index: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Rows of a packed weight as numbers: an embedding. No gradient passes.

    Args:
        weight: `[N, C]`.
        index: int32 or int64, any shape, in `[0, N)`.
        impl: Which implementation runs; an explicit choice never falls back.

    Returns:
        fp32 `[..., C]`.

    Raises:
        TypeError: `index` is not int32 or int64.
        IndexError: A row that there is not.
        NotImplementedError: The implementation asked for cannot run this input.
    """
    check_tensor("packed_rows", "index", index, "[...]", (None,) * index.ndim, integer=True)
    flat = index.reshape(-1)
    chosen = resolve_impl("packed_rows", impl, {"native": _native_gap(weight, weight.panels), "reference": None})
    outside = IndexError(f"packed_rows: index must lie in [0, {weight.rows})")
    if chosen == "native":
        from dsa.ops.packed_linear import native

        if index.dtype == torch.int64 and flat.numel() and int(flat.max()) > torch.iinfo(torch.int32).max:
            raise outside
        try:
            rows = native.packed_rows(weight, flat.to(torch.int32).contiguous())
        except native_support.OutOfRange:
            raise outside from None
    else:
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < weight.rows:
            raise outside
        rows = reference.packed_rows(weight, flat.long())
    return rows.view(*index.shape, weight.columns)


def _native_gap(weight: PackedWeight, *tensors: Tensor | None) -> str | None:
    """Why the compiled kernels cannot take these arguments, or `None` where they can."""
    for tensor in (weight.panels, *tensors):
        if tensor is not None and not tensor.is_cpu:
            return f"the kernels run on the CPU, and the tensors are on {tensor.device}"
        if tensor is not None and tensor.dtype == torch.float64:
            return "the kernel sums in fp32, and the input is fp64"
    return native_support.gap()


def _product(input: Tensor, weight: PackedWeight, bias: Tensor | None, impl: Impl) -> Tensor:
    flat = input.reshape(-1, weight.columns)
    gap = _native_gap(weight, input, bias)
    if resolve_impl("packed_linear", impl, {"native": gap, "reference": None}) == "native":
        from dsa.ops.packed_linear import native

        if flat.stride(1) != 1 and flat.shape[1] > 1:
            flat = flat.contiguous()
        out = native.packed_linear(flat, weight, None if bias is None else bias.float().contiguous())
    else:
        out = reference.packed_linear(flat, weight, bias)
    return out.to(input.dtype).view(*input.shape[:-1], weight.rows)


class _Product(torch.autograd.Function):
    """The product, whose gradient widens some rows of the weight at a time."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: PackedWeight, bias: Tensor | None, impl: Impl) -> Tensor:
        ctx.weight, ctx.impl = weight, impl
        return _product(input, weight, bias, impl)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        grad, weight = grads[0].reshape(-1, ctx.weight.rows), ctx.weight
        to_input = to_bias = None
        if ctx.needs_input_grad[0]:
            dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
            to_input = torch.zeros(len(grad), weight.columns, dtype=dtype, device=grad.device)
            together = max(1, _GRADIENT_NUMBERS // max(1, weight.columns))
            for first in range(0, weight.rows, together):
                index = torch.arange(first, min(first + together, weight.rows), device=grad.device)
                # fp64 has no kernel for products, and rows are the same from either.
                rows = packed_rows(weight, index, impl="auto")
                to_input.addmm_(grad[:, first : first + together].to(dtype), rows.to(dtype))
            to_input = to_input.to(grads[0].dtype).view(*grads[0].shape[:-1], weight.columns)
        if ctx.needs_input_grad[2]:
            to_bias = grad.sum(0)
        return to_input, None, to_bias, None
