"""Hadamard rotation and eight-bit index keys and queries, in plain torch.

The order of every floating-point operation is part of the specification: see README.md.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa.ops.quantize.types import QuantizedKeys

KEY_LEVELS = 127
QUERY_LEVELS = 63
FP8_LARGEST = 448.0


def is_power_of_two(size: int) -> bool:
    """Whether a head of this size is rotated."""
    return size > 0 and size & (size - 1) == 0


def hadamard_transform(x: Tensor) -> Tensor:
    """Multiplies the last dim by the orthonormal, symmetric Hadamard matrix; it is its own inverse.

    Stages of distance 1, 2, 4, ... replace `(a, b)` by `(a + b, a - b)`, then everything is multiplied by
    `size**-0.5` rounded to the dtype.

    Raises:
        ValueError: The size is not a power of two.
    """
    size = x.shape[-1]
    if not is_power_of_two(size):
        raise ValueError(f"hadamard_transform: the last dim must be a power of two, got {list(x.shape)}")
    distance = 1
    y = x
    while distance < size:
        pairs = y.reshape(*x.shape[:-1], size // (2 * distance), 2, distance)
        first, second = pairs.unbind(-2)
        y = torch.stack((first + second, first - second), dim=-2)
        distance *= 2
    return y.reshape(x.shape) * size**-0.5


def rotate(x: Tensor) -> Tensor:
    """To fp32, and rotated where the size of the last dim is a power of two."""
    x = x.float()
    return hadamard_transform(x) if is_power_of_two(x.shape[-1]) else x


def quantize_keys_int8(k: Tensor, power_of_two: bool = False) -> QuantizedKeys:
    """`[B, S, Di]` to int8 in `[-127, 127]`."""
    data, scale = _round_to_levels(rotate(k), KEY_LEVELS, power_of_two)
    return QuantizedKeys(data, scale)


def quantize_keys_fp8(k: Tensor, power_of_two: bool = False) -> QuantizedKeys:
    """`[B, S, Di]` to e4m3 in `[-448, 448]`."""
    return QuantizedKeys(*round_to_fp8(rotate(k), power_of_two))


def round_to_fp8(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """fp32 `[..., n]` to e4m3 in `[-448, 448]` with one fp32 scale for the `n` of them, `[...]`."""
    scale = _scale(x, FP8_LARGEST, power_of_two)
    data = (x / scale.unsqueeze(-1)).nan_to_num(nan=0.0).clamp(-FP8_LARGEST, FP8_LARGEST)
    return data.to(torch.float8_e4m3fn), scale


def quantize_queries_int8(q: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, T, Hi, Di]` to int8 in `[-63, 63]`, with scales `[B, T, Hi]`."""
    return _round_to_levels(rotate(q), QUERY_LEVELS)


def _round_to_levels(rotated: Tensor, levels: int, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    scale = _scale(rotated, levels, power_of_two)
    data = (rotated / scale.unsqueeze(-1)).nan_to_num(nan=0.0).round().clamp(-levels, levels)
    return data.to(torch.int8), scale


def _scale(x: Tensor, largest: float, power_of_two: bool) -> Tensor:
    """`max|x| / largest` along the last dim: 1 where that is zero, NaN where it is not finite.

    `power_of_two` rounds it up to the next power of two.
    """
    highest = x.abs().amax(dim=-1)
    # A tensor, because torch divides by a number on CUDA as it multiplies by the rounded reciprocal.
    scale = highest / torch.full_like(highest, largest)
    if power_of_two:
        # scale = mantissa * 2**exponent with the mantissa in [1/2, 1): a power of two is where it is 1/2.
        mantissa, exponent = torch.frexp(scale)
        scale = torch.where(scale == 0, scale, torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int()))
    return scale.masked_fill(scale == 0, 1.0).masked_fill(~highest.isfinite(), torch.nan)
