"""Rows of latent attention in eight bits."""

from dsa.ops.packed_latents.api import pack_latents
from dsa.ops.packed_latents.types import PackedLatents

__all__ = ["PackedLatents", "pack_latents"]
