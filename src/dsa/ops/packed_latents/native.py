"""Latents to FP8 rows through the compiled kernel: one pass over each, straight into the cache.

Shapes: `B` batch, `S` key tokens, `L` latent dims, `R` rotated dims.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from dsa.ops import native_support
from dsa.ops.packed_latents.types import PackedLatents, row_bytes

_pack_scalars = struct.Struct("=4i").pack
"""What follows the tensors in `dsa_pack_latents_args`: latent dims, whether scales are powers of two, threads."""


def pack_latents(rows: Tensor, latent_dim: int, power_of_two: bool, out: PackedLatents | None) -> PackedLatents:
    """`[B, S, L + R]` to FP8 rows, written to `out` where given; the bytes of the reference."""
    rope_dim = rows.shape[-1] - latent_dim
    if out is None:
        data = torch.empty(*rows.shape[:2], row_bytes(latent_dim, rope_dim), dtype=torch.uint8)
        out = PackedLatents(data, latent_dim, rope_dim)
    data = out.data if out.data.stride(-1) == 1 else torch.empty(out.data.shape, dtype=torch.uint8)
    scalars = _pack_scalars(latent_dim, power_of_two, native_support.threads(), 0)
    native_support.call("pack_latents", native_support.pack(rows, data.view(torch.int8)) + scalars)
    if data is not out.data:
        out.data.copy_(data)
    return out
