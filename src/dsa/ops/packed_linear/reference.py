"""What a packed weight means, and its product with activations in eight bits, in plain torch.

Shapes: `T` tokens, `N` rows (features out), `C` columns (features in).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa.ops.packed_linear.packing import from_panels
from dsa.ops.packed_linear.types import BLOCK_COLUMNS, PANEL_ROWS, SUPER_COLUMNS, BlockFormat, PackedWeight

LEVELS = 127
SMALLEST = 2.0**-100
"""A group whose numbers are all smaller counts as zeros: 127 divided by them would leave fp32."""


def packed_linear(input: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`[T, C]` to fp32 `[T, N]`; fp64 where the input is fp64."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    quants, scale = quantize_activations(input)
    rounded = (quants.to(dtype) * scale.to(dtype)[..., None]).flatten(1)[:, : weight.columns]
    out = rounded @ dequantize(weight).to(dtype).T
    return out if bias is None else out + bias


def quantize_activations(input: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers in [-127, 127] `[T, groups, 32]` and fp32 scales `[T, groups]`, NaN where a group is not finite."""
    groups = torch.nn.functional.pad(input.float(), (0, -input.shape[1] % BLOCK_COLUMNS)).unflatten(
        1, (-1, BLOCK_COLUMNS)
    )
    largest = groups.abs().amax(2)
    finite, usable = largest.isfinite(), largest >= SMALLEST
    # A true division: a number divided by a tensor is the tensor's reciprocal, rounded, times the number.
    inverse = torch.where(finite & usable, torch.full_like(largest, LEVELS) / largest, 0.0)
    quants = torch.where(finite[..., None], groups, 0.0).mul(inverse[..., None]).round()
    return quants, torch.where(finite, torch.where(usable, largest / LEVELS, 0.0), torch.nan)


def packed_rows(weight: PackedWeight, index: Tensor) -> Tensor:
    """Rows `[T]` as fp32 `[T, C]`."""
    panels = weight.panels[index // PANEL_ROWS]
    numbers = _numbers(panels, weight.format, weight.columns).unflatten(0, (-1, PANEL_ROWS))
    return numbers[torch.arange(len(index), device=index.device), index % PANEL_ROWS]


def dequantize(weight: PackedWeight) -> Tensor:
    """The whole weight, fp32 `[N, C]`."""
    return _numbers(weight.panels, weight.format, weight.columns)[: weight.rows]


def _numbers(panels: Tensor, format: BlockFormat, columns: int) -> Tensor:
    """fp32, for all 16 rows of each panel: `scale * (quant - zero) + minimum`."""
    fields = from_panels(panels, format, columns)
    scale, minimum = fields.scale, fields.minimum
    if fields.super_scale is not None:
        # Scales have a sign where there is no minimum; minima of superblocks are subtracted.
        scale = (scale if format.minimum else scale.view(torch.int8)).float()
        scale = scale * _each(fields.super_scale, SUPER_COLUMNS // BLOCK_COLUMNS * format.parts)
        if minimum is not None and fields.super_minimum is not None:
            minimum = -(minimum.float() * _each(fields.super_minimum, SUPER_COLUMNS // BLOCK_COLUMNS))
    quants = fields.quants.float() - format.zero
    numbers = quants * _each(scale, BLOCK_COLUMNS // format.parts)
    if minimum is not None:
        numbers = numbers + _each(minimum, BLOCK_COLUMNS)
    return numbers[:, :columns]


def _each(x: Tensor, times: int) -> Tensor:
    return x.float().repeat_interleave(times, 1)
