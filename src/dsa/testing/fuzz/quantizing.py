"""Random calls of the quantisers: of `quantize_index_keys`, and of `pack_latents`.

Shapes: `B` batch, `S` key tokens, `Di` index head dim.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dsa.ops import quantize_index_keys
from dsa.ops.packed_latents import pack_latents
from dsa.ops.quantize.types import QuantizedKeys
from dsa.ops.types import Impl
from dsa.testing.fuzz.draw import Difference, Draws, numbers
from dsa.testing.fuzz.softmax import EPS, SMALLEST

KEY_LEVELS, LARGEST_E4M3 = 127, 448.0


def hadamard_rotated(x: np.ndarray) -> np.ndarray:
    """fp32, multiplied by the orthonormal Hadamard matrix where the last dim is a power of two, stage after stage."""
    dim = x.shape[-1]
    if dim & (dim - 1):
        return x
    with np.errstate(all="ignore"):
        distance = 1
        while distance < dim:
            parts = x.reshape(*x.shape[:-1], -1, 2, distance)
            pair = parts[..., 0, :], parts[..., 1, :]
            x = np.stack([pair[0] + pair[1], pair[0] - pair[1]], axis=-2).reshape(*x.shape)
            distance *= 2
        return x * np.float32(dim**-0.5)


def to_levels(x: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers in `[-levels, levels]` and fp32 scales, as `quantize/README.md` defines them."""
    with np.errstate(all="ignore"):
        highest = np.abs(x).max(axis=-1)
        scale = (highest / np.float32(levels)).astype(np.float32)
        scale = np.where(scale == 0, np.float32(1), scale)
        broken = ~np.isfinite(highest)
        data = np.clip(np.rint(x / scale[..., None]), -levels, levels)
        data = np.where(broken[..., None], 0, data).astype(np.int32)
        return data, np.where(broken, np.float32(np.nan), scale).astype(np.float32)


def fuzz_quantize(draws: Draws) -> None:
    """One call of `quantize_index_keys` or `pack_latents`: bytes as documented, and near the numbers they stand for."""
    impl = draws.implementation()
    batch, tokens, dim = draws.whole(1, 2), draws.size(5, 40, 300), draws.pick((draws.size(9, 150), 32, 64, 128))
    k = draws.normal((batch, tokens, dim), draws.pick((1.0, 1.0, 1e-38, 3e-44, 1e30)))
    if draws.chance(0.2):
        k *= 10.0 ** draws.numbers.uniform(-45, 3, (batch, tokens, 1))
    if draws.chance(0.3):
        k.reshape(-1)[draws.whole(0, k.size - 1)] = draws.pick((np.nan, np.inf, -np.inf))
    given = draws.lay_out(k, draws.pick(draws.floats))
    draws.note(shape=f"B{batch} S{tokens} Di{dim}", dtype=given.dtype)
    if draws.chance(0.4):
        return _fuzz_rows(draws, given, impl)
    kind: Literal["int8", "fp8"] = draws.pick(("int8", "fp8")) if impl != "native" else "int8"
    power = impl != "native" and draws.chance(0.3)
    out = None
    if draws.chance(0.3):
        room = torch.empty((batch, tokens + 3, dim), dtype=torch.int8 if kind == "int8" else torch.float8_e4m3fn)
        out = QuantizedKeys(room, torch.full((batch, tokens + 3), 7.0))[:, 2 : 2 + tokens]
    draws.note(kind=kind, power_of_two=power, out=out is not None)
    keys = quantize_index_keys(given, kind, power_of_two=power, out=out, impl=impl)
    rotated = hadamard_rotated(given.float().numpy())
    if kind == "int8" and not power:
        data, scale = to_levels(rotated, KEY_LEVELS)
        if not (np.array_equal(data, keys.data.numpy()) and np.array_equal(scale, keys.scale.numpy(), equal_nan=True)):
            raise Difference("quantize_index_keys: bytes differ from those that are documented")
    near(rotated, numbers(keys.data.float()), numbers(keys.scale), KEY_LEVELS if kind == "int8" else None, power)


def _fuzz_rows(draws: Draws, given: Tensor, impl: Impl) -> None:
    dim = given.shape[-1]
    latent = draws.whole(1, dim)
    if impl == "triton":
        latent = max(4, latent // 4 * 4)
        given = given[..., : max(latent, dim // 2 * 2)] if dim >= 4 else torch.nn.functional.pad(given, (0, 4 - dim))
    power = draws.chance(0.3)
    draws.note(latent=latent, power_of_two=power)
    rows = pack_latents(given, latent, power_of_two=power, impl=impl)
    x = given.float().numpy()
    turned = numbers(rows.unpack())[..., latent:]
    with np.errstate(all="ignore"):
        exact = x[..., latent:].astype(np.float64)
        wrong = np.where(
            np.isfinite(exact), ~(np.abs(turned - exact) <= 2.0**-8 * np.abs(exact) + 2.0**-133), np.isfinite(turned)
        )
        wrong &= np.abs(exact) < 3.38e38
    if wrong.any():
        raise Difference(
            f"pack_latents: rotated dims at {np.argwhere(wrong)[0].tolist()} are no bf16 of what was given"
        )
    for first in range(0, latent, 128):
        part = slice(first, min(first + 128, latent))
        offset = latent + 4 * (first // 128)
        scale = rows.data[..., offset : offset + 4].clone(memory_format=torch.contiguous_format)
        scale = scale.view(torch.float32)[..., 0]
        codes = rows.data[..., part].view(torch.float8_e4m3fn).float()
        near(x[..., part], numbers(codes), numbers(scale), None, power)


def near(
    x: np.ndarray,
    data: np.ndarray,
    scale: np.ndarray,
    levels: int | None,
    power_of_two: bool,
    error: np.ndarray | float = 0.0,
) -> None:
    """Checks that `data * scale` is `x`, to half a level of whole numbers or, without `levels`, of e4m3.

    Args:
        error: How far the numbers that were quantised may be from `x`, which is broadcast to.

    Raises:
        Difference: It is not, or the scale is not the one that is documented.
    """
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        highest = np.abs(wide).max(axis=-1)
        farthest = np.broadcast_to(error, wide.shape).max(axis=-1)
        broken, zero = ~np.isfinite(highest), highest - farthest < 2.0**-140
        most = levels or LARGEST_E4M3
        wanted = highest / most
        # A scale may be a subnormal number, whose last place is a large part of it.
        low = (highest - farthest) / most * (1 - 2 * EPS) - SMALLEST
        high = (highest + farthest) / most * (1 + 2 * EPS) + SMALLEST
        if power_of_two:
            high = 2 * high
        fits = np.where(zero, (scale == 1) | ((scale >= low) & (scale <= high)), (scale >= low) & (scale <= high))
        if (np.where(broken, ~np.isnan(scale), ~fits)).any() or data[broken].any():
            place = np.argwhere(np.where(broken, ~np.isnan(scale), ~fits))
            raise Difference(
                f"quantisation: wrong scale or data at {place[:1].tolist()}, max|x| there is {highest.max()}"
            )
        back = data * scale[..., None]
        step = 0.5 * scale[..., None] if levels else np.maximum(2.0**-4 * np.abs(wide), 2.0**-10 * scale[..., None])
        # The scale's own rounding moves the largest level, by up to half of it where the scale is subnormal.
        allowed = (
            step * (1 + 1e-5) + np.abs(wide) * np.minimum(4 * EPS + 2 * SMALLEST / wanted[..., None], 1.0) + SMALLEST
        )
        # What was quantised lies this much elsewhere, and a level of e4m3 is relative to it.
        allowed = allowed + (1 + 2.0**-3) * error
        wrong = ~broken[..., None] & ~zero[..., None] & ~(np.abs(back - wide) <= allowed)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise Difference(f"quantisation: {back[at]:.9g} stands for {wide[at]:.9g}, allowed {allowed[at]:.3g}")
