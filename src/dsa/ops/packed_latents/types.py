"""Rows of latent attention in eight bits.

Shapes: `B` batch, `S` key tokens, `L` latent dims, `R` rotated dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa.ops.checks import describe

GROUP = 128
"""Latent dims that share a scale."""


def scales_of(latent_dim: int) -> int:
    """How many scales a row has; the last group may be shorter."""
    return -(-latent_dim // GROUP)


def row_bytes(latent_dim: int, rope_dim: int) -> int:
    """Bytes of one row: `L` e4m3 values, their fp32 scales, and `R` bf16 values; 656 for 512 and 64."""
    return latent_dim + 4 * scales_of(latent_dim) + 2 * rope_dim


@dataclass(frozen=True)
class PackedLatents:
    """One row of bytes a token, in the place of `k` and `v` of `sparse_attention`: the FP8 rows of FlashMLA.

    `[L e4m3 values | one fp32 scale for every 128 of them | R bf16 values]`, 656 bytes for DeepSeek's 512 + 64 dims.
    The key of a token is `[value * scale; rotated dims]`, its value the first `L` of that. Make one with
    `pack_latents`, or from rows that a serving engine wrote.

    Args:
        data: uint8 `[B, S, row_bytes]`, any strides.
        latent_dim: `L`.
        rope_dim: `R`.

    Raises:
        TypeError: Another dtype than uint8.
        ValueError: Not three dims, or rows of another length than `L` and `R` make.
    """

    data: Tensor
    latent_dim: int = 512
    rope_dim: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.data, Tensor) or self.data.dtype != torch.uint8:
            raise TypeError(
                f"PackedLatents: data must be uint8 [B, S, bytes], got {describe(self.data)}; "
                "make it with pack_latents, or view the rows as bytes with .view(torch.uint8)"
            )
        if self.latent_dim < 1 or self.rope_dim < 0:
            raise ValueError(
                f"PackedLatents: latent_dim must be at least 1 and rope_dim at least 0, "
                f"got {self.latent_dim} and {self.rope_dim}"
            )
        check_row_bytes("PackedLatents: data", self.data, 3, self.latent_dim, self.rope_dim)

    @property
    def shape(self) -> torch.Size:
        """`[B, S, L + R]`, what `unpack` gives."""
        return torch.Size((*self.data.shape[:2], self.latent_dim + self.rope_dim))

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        return self.data.device

    def __getitem__(self, item: slice | tuple[slice, slice]) -> PackedLatents:
        """Slices batch and tokens without a copy: `rows[b:c]`, `rows[:, s:t]`.

        Raises:
            TypeError: Anything but one or two slices.
        """
        parts = item if isinstance(item, tuple) else (item,)
        if len(parts) > 2 or not all(isinstance(part, slice) for part in parts):
            raise TypeError(f"PackedLatents takes one or two slices, rows[b:c, s:t], got {item!r}")
        return PackedLatents(self.data[item], self.latent_dim, self.rope_dim)

    def to(self, device: torch.device | str) -> PackedLatents:
        """The same rows on another device."""
        return PackedLatents(self.data.to(device), self.latent_dim, self.rope_dim)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows as numbers, `[B, S, L + R]`, decoded in fp32 and rounded to `dtype`."""
        return decode_rows(self.data, self.latent_dim, self.rope_dim).to(dtype)


def check_row_bytes(what: str, data: Tensor, dims: int, latent_dim: int, rope_dim: int) -> None:
    """Checks that the last of `dims` dims is one row of bytes.

    Raises:
        ValueError: It is not.
    """
    wanted = row_bytes(latent_dim, rope_dim)
    if data.ndim != dims or data.shape[-1] != wanted:
        raise ValueError(
            f"{what} must have {dims} dims and rows of {wanted} bytes ({latent_dim} e4m3 values, "
            f"{scales_of(latent_dim)} fp32 scales, {rope_dim} bf16 values), got {describe(data)}; rows of another "
            "length were written for other sizes or by another version of the layout: give their latent_dim and "
            "rope_dim, or write them again"
        )


def decode_rows(data: Tensor, latent_dim: int, rope_dim: int) -> Tensor:
    """Rows of bytes `[..., row_bytes]` as fp32 `[..., L + R]`."""
    end = latent_dim + 4 * scales_of(latent_dim)
    codes = data[..., :latent_dim].view(torch.float8_e4m3fn).float()
    scale = dense(data[..., latent_dim:end]).view(torch.float32)
    latent = codes * scale.repeat_interleave(GROUP, dim=-1)[..., :latent_dim]
    if not rope_dim:
        return latent
    return torch.cat((latent, dense(data[..., end:]).view(torch.bfloat16).float()), dim=-1)


def dense(data: Tensor) -> Tensor:
    """A copy in one piece, which can be viewed as numbers of another width wherever the bytes lay before."""
    return data.clone(memory_format=torch.contiguous_format)
