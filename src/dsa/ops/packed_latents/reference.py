"""Rows of latent attention to eight bits, in plain torch: the specification of `pack_latents`.

Shapes: `B` batch, `S` key tokens, `L` latent dims, `R` rotated dims.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa.ops.packed_latents.types import GROUP, dense, scales_of
from dsa.ops.quantize.reference import round_to_fp8


def pack_rows(rows: Tensor, latent_dim: int, power_of_two: bool) -> Tensor:
    """`[..., L + R]` to bytes `[..., row_bytes]`."""
    rows = rows.float()
    latent, rotated = rows[..., :latent_dim], rows[..., latent_dim:]
    # Zeros after the last group change neither its scale nor its values.
    groups = F.pad(latent, (0, scales_of(latent_dim) * GROUP - latent_dim)).unflatten(-1, (-1, GROUP))
    codes, scale = round_to_fp8(groups, power_of_two)
    parts = (codes.flatten(-2)[..., :latent_dim], scale, rotated.to(torch.bfloat16))
    return torch.cat([dense(part).view(torch.uint8) for part in parts if part.shape[-1]], dim=-1)
