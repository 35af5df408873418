"""Products with packed weights, and rows of them, through the compiled kernels.

Shapes: `T` tokens, `N` rows (features out), `C` columns (features in).
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from dsa.ops import native_support
from dsa.ops.packed_linear.types import PackedWeight

_pack_product = struct.Struct("=QQii").pack
"""What follows the tensors in `dsa_packed_linear_args`: panels, bias, format, threads."""

_pack_rows = struct.Struct("=Qqii").pack
"""What follows the tensors in `dsa_packed_rows_args`: panels, number of rows, format, threads."""


def packed_linear(input: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`[T, C]`, rows in one piece, to fp32 `[T, N]`; the bias is fp32 and dense."""
    out = torch.empty(input.shape[0], weight.rows)
    bias_at = 0 if bias is None else bias.data_ptr()
    rest = _pack_product(weight.panels.data_ptr(), bias_at, weight.format.number, native_support.threads())
    native_support.call("packed_linear", native_support.pack(input, out) + rest)
    return out


def packed_rows(weight: PackedWeight, index: Tensor) -> Tensor:
    """Rows `[T]`, int32 and dense, as fp32 `[T, C]`. Raises `native_support.OutOfRange`."""
    out = torch.empty(index.shape[0], weight.columns)
    rest = _pack_rows(weight.panels.data_ptr(), weight.rows, weight.format.number, native_support.threads())
    native_support.call("packed_rows", native_support.pack(index, out) + rest)
    return out
