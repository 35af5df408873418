"""Index keys in eight bits.

Shapes: `B` batch, `S` key tokens, `Di` index head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_NAMES: dict[torch.dtype, Literal["int8", "fp8"]] = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True)
class QuantizedKeys:
    """Index keys as one byte a dim and one scale a token: `key = data * scale`, in the rotated frame.

    The frame is rotated by `hadamard_transform` where `Di` is a power of two. Make one with
    `quantize_index_keys`, or from buffers that it has filled.

    Args:
        data: int8 or float8_e4m3fn `[B, S, Di]`.
        scale: fp32 `[B, S]`. NaN marks a token whose key was not finite; its scores are NaN.

    Raises:
        TypeError: Another dtype.
        ValueError: Shapes or devices that do not fit together.
    """

    data: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.data.dtype not in _NAMES or self.scale.dtype != torch.float32:
            raise TypeError(
                "QuantizedKeys: data must be int8 or float8_e4m3fn and scale float32, "
                f"got {self.data.dtype} and {self.scale.dtype}; make them with quantize_index_keys"
            )
        if self.data.ndim != 3 or self.scale.shape != self.data.shape[:2]:
            raise ValueError(
                "QuantizedKeys: data must be [B, S, Di] and scale [B, S], "
                f"got {list(self.data.shape)} and {list(self.scale.shape)}"
            )
        if self.data.device != self.scale.device:
            raise ValueError(f"QuantizedKeys: data is on {self.data.device}, scale on {self.scale.device}; move one")

    @property
    def dtype(self) -> Literal["int8", "fp8"]:
        """`"int8"` or `"fp8"`."""
        return _NAMES[self.data.dtype]

    @property
    def shape(self) -> torch.Size:
        """`[B, S, Di]`."""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        """Where data and scale live."""
        return self.data.device

    def __getitem__(self, item: slice | tuple[slice, slice]) -> QuantizedKeys:
        """Slices batch and tokens without a copy: `keys[b:c]`, `keys[:, s:t]`.

        Raises:
            TypeError: Anything but one or two slices.
        """
        parts = item if isinstance(item, tuple) else (item,)
        if len(parts) > 2 or not all(isinstance(part, slice) for part in parts):
            raise TypeError(f"QuantizedKeys takes one or two slices, keys[b:c, s:t], got {item!r}")
        return QuantizedKeys(self.data[item], self.scale[item])

    def to(self, device: torch.device | str) -> QuantizedKeys:
        """The same keys on another device."""
        return QuantizedKeys(self.data.to(device), self.scale.to(device))

    def dequantize(self) -> Tensor:
        """The keys in fp32 `[B, S, Di]`, still rotated; `hadamard_transform` undoes the rotation."""
        return self.data.float() * self.scale.unsqueeze(-1)
