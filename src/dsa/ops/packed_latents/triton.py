"""Latents to FP8 rows on GPUs, straight into the cache: each row is read once and written once.

Bit-identical with `reference.py` on a CPU. Scales and rotated dims are written byte by byte, because a row of other
sizes than DeepSeek's need not have them where numbers of four or two bytes can be stored.

Shapes: `B` batch, `S` key tokens, `L` latent dims, `R` rotated dims.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa.ops.packed_latents.types import GROUP, PackedLatents, row_bytes, scales_of
from dsa.ops.quantize.triton import encode_e4m3, levels_of, scale_of
from dsa.ops.triton_support import on

_FP8_LARGEST = 448.0
_ROWS_PER_PROGRAM = 16


@triton.jit
def _pack_kernel(
    x_ptr,
    data_ptr,
    rows,
    inner,
    x_strides,
    data_strides,
    largest,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """Rows of `x[outer, inner, LATENT + ROPE]`."""
    stride_xa, stride_xb, stride_xd = x_strides
    stride_da, stride_db, stride_dd = data_strides
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = row < rows
    a = (row // inner).to(tl.int64)
    b = (row % inner).to(tl.int64)
    source = (x_ptr + a * stride_xa + b * stride_xb)[:, None]
    target = (data_ptr + a * stride_da + b * stride_db)[:, None]
    byte = tl.arange(0, 4)
    for group in tl.static_range(GROUPS):
        dim = group * GROUP + tl.arange(0, GROUP)
        inside = present[:, None] & (dim < LATENT)[None, :]
        x = tl.load(source + (dim * stride_xd)[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = scale_of(x, largest, BLOCK_ROWS, POWER_OF_TWO)
        codes = encode_e4m3(levels_of(x, scale, largest, BLOCK_ROWS, GROUP))
        tl.store(target + (dim * stride_dd)[None, :], codes, mask=inside)
        bits = scale.to(tl.int32, bitcast=True)[:, None] >> (8 * byte)[None, :]
        place = (LATENT + 4 * group + byte) * stride_dd
        tl.store(target + place[None, :], (bits & 0xFF).to(tl.uint8), mask=present[:, None])
    if ROPE > 0:
        byte = tl.arange(0, BLOCK_ROPE)
        inside = present[:, None] & (byte < 2 * ROPE)[None, :]
        x = tl.load(source + ((LATENT + byte // 2) * stride_xd)[None, :], mask=inside, other=0.0).to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        # Half to even, as torch rounds to bf16; a NaN must not become an infinity.
        rounded = tl.where(x != x, 0x7FC0, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF)
        half = (rounded >> (8 * (byte % 2))[None, :]) & 0xFF
        place = (LATENT + 4 * GROUPS + byte) * stride_dd
        tl.store(target + place[None, :], half.to(tl.uint8), mask=inside)


def pack_latents(rows: Tensor, latent_dim: int, power_of_two: bool, out: PackedLatents | None) -> PackedLatents:
    """`[B, S, L + R]` to FP8 rows, written to `out` where given; the bytes of the reference."""
    rope_dim = rows.shape[-1] - latent_dim
    if out is None:
        data = torch.empty(*rows.shape[:2], row_bytes(latent_dim, rope_dim), dtype=torch.uint8, device=rows.device)
        out = PackedLatents(data, latent_dim, rope_dim)
    _write_rows(rows.detach(), out.data, latent_dim, power_of_two)
    return out


@torch.library.custom_op("dsa::pack_latents_triton", mutates_args=("data",))
def _write_rows(rows: Tensor, data: Tensor, latent_dim: int, power_of_two: bool) -> None:
    """One operator to `torch.compile`."""
    batch, tokens, width = rows.shape
    if not batch * tokens:
        return
    rope_dim = width - latent_dim
    with on(rows.device):
        _pack_kernel[(triton.cdiv(batch * tokens, _ROWS_PER_PROGRAM),)](
            rows, data, batch * tokens, tokens, rows.stride(), data.stride(), _FP8_LARGEST,
            LATENT=latent_dim, ROPE=rope_dim, GROUPS=scales_of(latent_dim), GROUP=GROUP,
            BLOCK_ROPE=triton.next_power_of_2(max(1, 2 * rope_dim)), BLOCK_ROWS=_ROWS_PER_PROGRAM,
            POWER_OF_TWO=power_of_two, num_warps=4,
        )  # fmt: skip


@_write_rows.register_fake
def _(rows: Tensor, data: Tensor, latent_dim: int, power_of_two: bool) -> None:
    return None
