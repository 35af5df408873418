"""Rows of latent attention in eight bits. Layout: README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa.ops import native_support, triton_support
from dsa.ops.blocks import full_precision
from dsa.ops.checks import check_count, check_tensor
from dsa.ops.packed_latents import reference
from dsa.ops.packed_latents.types import PackedLatents
from dsa.ops.types import Impl, resolve_impl

_OP = "pack_latents"


def pack_latents(
    rows: Tensor,
    latent_dim: int = 512,
    *,
    power_of_two: bool = False,
    out: PackedLatents | None = None,
    impl: Impl = "auto",
) -> PackedLatents:
    """Rounds the latents of multi-head latent attention to e4m3, and their rotated dims to bf16: 656 bytes a token.

    Every 128 latent dims share the scale `max|x| / 448`; zeros have scale 1, and a group with NaN or infinity has
    scale NaN and zeros as data.

    Args:
        rows: `[B, S, L + R]`: the latent, followed by the key dims that carry RoPE; converted to fp32 first. No
            gradient passes.
        latent_dim: `L`.
        power_of_two: Round each scale up to a power of two, as caches do that keep no more than its exponent (ue8m0).
        out: Where to write in place of new rows: the next tokens of a preallocated cache, `cache[:, a:b]`.
        impl: Which implementation runs; an explicit choice never falls back. All give the same bytes.

    Returns:
        The rows: `out`, where given.

    Raises:
        TypeError: `rows` is not a floating-point tensor.
        ValueError: `rows` is not `[B, S, L + R]`, or `out` of another shape, split or device.
        NotImplementedError: The implementation asked for cannot run this input.
    """
    check_tensor(_OP, "rows", rows, "[B, S, L + R]", (None, None, None))
    check_count(_OP, "latent_dim", latent_dim, 1)
    if rows.shape[-1] < latent_dim:
        raise ValueError(
            f"{_OP}: rows must have at least latent_dim={latent_dim} dims, got {list(rows.shape)}; "
            "they are the latent followed by the dims with RoPE"
        )
    if out is not None and (out.shape, out.latent_dim, out.device) != (rows.shape, latent_dim, rows.device):
        raise ValueError(
            f"{_OP}: out must be {list(rows.shape)} with latent_dim={latent_dim} on {rows.device} like the rows, "
            f"got {list(out.shape)} with latent_dim={out.latent_dim} on {out.device}; slice it"
        )
    others = {"native": native_support.gap(rows), "reference": None}
    chosen = resolve_impl(_OP, impl, triton_support.with_triton(others, rows))
    if chosen == "triton":
        from dsa.ops.packed_latents import triton

        return triton.pack_latents(rows, latent_dim, power_of_two, out)
    if chosen == "native":
        from dsa.ops.packed_latents import native

        return native.pack_latents(rows.detach(), latent_dim, power_of_two, out)
    with torch.no_grad(), full_precision(rows.device):
        data = reference.pack_rows(rows, latent_dim, power_of_two)
    if out is None:
        return PackedLatents(data, latent_dim, rows.shape[-1] - latent_dim)
    out.data.copy_(data)
    return out
