"""Random calls of `index_topk`, of the quantisers, and of the rows and pages that keys are kept in.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `K` top-k.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dsa.ops import index_topk, quantize_index_keys
from dsa.ops.packed_latents import pack_latents
from dsa.ops.paging.types import PagedKeys
from dsa.ops.quantize.types import QuantizedKeys
from dsa.ops.types import Impl
from dsa.testing.fuzz.draw import Difference, Draws, numbers
from dsa.testing.fuzz.softmax import EPS, SMALLEST

KEY_LEVELS, QUERY_LEVELS, LARGEST_E4M3 = 127, 63, 448.0


def fuzz_index_topk(draws: Draws) -> None:
    """One selection, over floating-point, int8 or fp8 keys, in one piece or in pages."""
    impl = draws.implementation()
    batch, tokens, keys = draws.whole(1, 2), draws.size(3, 12), draws.size(30, 90, 700)
    if draws.small:
        keys = min(keys, 40)
    heads, dim = draws.size(3, 9), draws.pick((draws.size(9, 40), 16, 32))
    top_k = draws.pick((draws.size(8, 40), 1, keys))
    sinks, local = draws.pick((0, 0, draws.whole(0, top_k))), 0
    local = draws.pick((0, draws.whole(0, top_k - sinks)))
    kind: Literal["float", "int8", "fp8"] = draws.pick(("float", "float", "int8", "int8", "fp8"))
    whole = draws.chance(0.3)
    size = draws.pick((1.0, 1.0, 1e-20, 1e-42, 1e12))
    q = draws.normal((batch, tokens, heads, dim), size)
    k = draws.normal((batch, keys, dim), draws.pick((1.0, 1e-20, 1e12)))
    w = draws.normal((batch, tokens, heads), 1.0)
    if whole:
        q, k, w = (draws.numbers.integers(-2, 3, x.shape).astype(float) for x in (q, k, w))
    elif draws.chance(0.2):
        for values in (q, k, w):
            values.reshape(-1)[draws.whole(0, values.size - 1)] = draws.pick((np.nan, np.inf, -np.inf))
    dtype = draws.pick(draws.floats) if size == 1.0 else torch.float32
    q_given, w_given = draws.lay_out(q, dtype), draws.lay_out(w, draws.pick((dtype, torch.float32)))
    k_given = draws.lay_out(k, torch.float32 if kind != "float" or dtype == torch.float32 else dtype)
    scale = draws.pick((None, None, 0.3, -1.0, 1e-10, 0.0))
    start, end = draws.ranges(batch, tokens, keys)
    stored: Tensor | QuantizedKeys | PagedKeys = k_given
    if kind != "float":
        stored = quantize_index_keys(k_given, kind, impl="reference")
        if draws.chance(0.3):
            stored = _in_pages(draws, stored)
    draws.note(
        shape=f"B{batch} T{tokens} S{keys} Hi{heads} Di{dim} K{top_k}", sinks=sinks, local=local, kind=kind,
        whole=whole, dtype=dtype, scale=scale, paged=isinstance(stored, PagedKeys),
    )  # fmt: skip
    selection = index_topk(
        q_given, stored, w_given, top_k, scale=scale, sinks=sinks, local=local, key_start=start, key_end=end, impl=impl
    )
    factor = dim**-0.5 if scale is None else scale
    scores, off = _scores(q_given, k_given, w_given, factor, kind)
    if whole and kind == "float" and scale == -1.0:
        off = np.zeros_like(off)
    for b, t in np.ndindex(batch, tokens):
        first = 0 if start is None else int(start[b, t])
        last = max(keys - tokens + t + 1, 0) if end is None else int(end[b, t])
        seen = np.arange(first, last)
        _judge(selection[b, t].numpy(), seen, scores[b, t], off[b, t], top_k, sinks, local, f"query {b}, {t}")


def _in_pages(draws: Draws, keys: QuantizedKeys) -> PagedKeys:
    batch, tokens, dim = keys.shape
    block = draws.pick((4, 16, 64))
    per_row = -(-tokens // block)
    pages = torch.from_numpy(draws.numbers.integers(0, 255, (batch * per_row + 1, block, dim + 4))).byte()
    table = torch.from_numpy(draws.numbers.permutation(len(pages))[: batch * per_row].reshape(batch, per_row)).int()
    paged = PagedKeys(pages, table, tokens, keys.dtype)
    paged.write(keys)
    return paged


def _scores(q: Tensor, k: Tensor, w: Tensor, scale: float, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores `[B, T, S]` and how far each may be off. Those of int8 keys follow the documented roundings: no error."""
    weights = w.detach().float().numpy()
    with np.errstate(all="ignore"):
        if kind == "int8":
            data, scales = _levels(_rotated(k.float().numpy()), KEY_LEVELS)
            query, query_scales = _levels(_rotated(q.float().numpy()), QUERY_LEVELS)
            dots = np.maximum(np.einsum("bthd,bsd->bths", query.astype(np.int64), data.astype(np.int64)), 0)
            coefficient = (weights * query_scales) * np.float32(scale)
            total = None
            for head in range(q.shape[2]):
                term = coefficient[:, :, head, None] * dots[:, :, head].astype(np.float32)
                total = term if total is None else total + term
            assert total is not None
            return (total * scales[:, None]).astype(np.float64), np.zeros(total.shape)
        key_scale = np.zeros(k.shape[:2])
        if kind == "fp8":
            kept = quantize_index_keys(k, "fp8", impl="reference")
            key_scale = numbers(kept.scale)
            keys = numbers(kept.data.float()) * key_scale[..., None]
            queries = _rotated(q.float().numpy()).astype(np.float64)
        else:
            keys, queries = numbers(k), numbers(q)
        dots = np.einsum("bthd,bsd->bths", queries, keys)
        sizes = np.einsum("bthd,bsd->bths", np.abs(queries), np.abs(keys))
        # Rounded to fp32 once, as documented: what vanishes there is zero, times infinity too.
        passed = np.where(np.isnan(dots), np.nan, np.maximum(dots, 0)).astype(np.float32).astype(np.float64)
        factor = weights.astype(np.float64) * scale
        scores = np.einsum("bth,bths->bts", factor, passed)
        rounding = (q.shape[2] + 6) * EPS * np.einsum("bth,bths->bts", np.abs(factor), passed)
        off = rounding + 1e-12 * np.einsum("bth,bths->bts", np.abs(factor), sizes)
        # Numbers that become subnormal on the way, before they are multiplied by what comes next.
        lost = 8 * SMALLEST * q.shape[2] * (1 + np.abs(factor).max(axis=-1)[..., None] + sizes.max(axis=2))
        return scores, off + lost * (1 + key_scale[:, None])


def _judge(
    row: np.ndarray,
    seen: np.ndarray,
    scores: np.ndarray,
    off: np.ndarray,
    top_k: int,
    sinks: int,
    local: int,
    what: str,
) -> None:
    """Checks count, order, what must be there, and that nothing left out beats anything selected."""
    count = min(top_k, len(seen))
    chosen = row[:count]
    if (row[count:] != -1).any() or (np.diff(chosen) <= 0).any() or not np.isin(chosen, seen).all():
        raise Difference(f"{what}: {row.tolist()} must be {count} ascending positions among {seen.tolist()}, then -1")
    if len(seen) <= top_k:
        return
    always = np.concatenate([seen[:sinks], seen[len(seen) - local :]])
    if not np.isin(always, chosen).all():
        raise Difference(f"{what}: {row.tolist()} lacks some of the sinks and local tokens {always.tolist()}")
    # Overflowed sums of both signs may be NaN in one order of additions and infinite in another.
    if not np.isfinite(off[seen]).all() and not np.isnan(scores[seen]).any():
        return
    picked = np.setdiff1d(chosen, always)
    rest = np.setdiff1d(seen, chosen)
    known, unknown = picked[~np.isnan(scores[picked])], picked[np.isnan(scores[picked])]
    left = rest[~np.isnan(scores[rest])]
    if len(unknown) and len(left):
        raise Difference(f"{what}: selected {unknown.tolist()} with scores of NaN and left out {left.tolist()}")
    if not len(known) or not len(left):
        return
    for s in left:
        with np.errstate(invalid="ignore"):
            beaten = scores[s] - np.nan_to_num(off[s]) > scores[known] + np.nan_to_num(off[known])
        # Of equal scores the most recent is selected.
        tied = (scores[s] == scores[known]) & (off[s] == 0) & (off[known] == 0) & (s > known)
        if (beaten | tied).any():
            worse = known[beaten | tied][0]
            raise Difference(f"{what}: selected {worse} ({scores[worse]:.9g}) and left out {s} ({scores[s]:.9g})")


def _rotated(x: np.ndarray) -> np.ndarray:
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


def _levels(x: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
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
    rotated = _rotated(given.float().numpy())
    if kind == "int8" and not power:
        data, scale = _levels(rotated, KEY_LEVELS)
        if not (np.array_equal(data, keys.data.numpy()) and np.array_equal(scale, keys.scale.numpy(), equal_nan=True)):
            raise Difference("quantize_index_keys: bytes differ from those that are documented")
    _near(rotated, numbers(keys.data.float()), numbers(keys.scale), KEY_LEVELS if kind == "int8" else None, power)


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
        _near(x[..., part], numbers(codes), numbers(scale), None, power)


def _near(x: np.ndarray, data: np.ndarray, scale: np.ndarray, levels: int | None, power_of_two: bool) -> None:
    """Checks that `data * scale` is `x`, to half a level of whole numbers or, without `levels`, of e4m3.

    Raises:
        Difference: It is not, or the scale is not the one that is documented.
    """
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        highest = np.abs(wide).max(axis=-1)
        broken, zero = ~np.isfinite(highest), highest < 2.0**-140
        wanted = highest / (levels or LARGEST_E4M3)
        # A scale may be a subnormal number, whose last place is a large part of it.
        low, high = wanted * (1 - 2 * EPS) - SMALLEST, wanted * (1 + 2 * EPS) + SMALLEST
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
        wrong = ~broken[..., None] & ~zero[..., None] & ~(np.abs(back - wide) <= allowed)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise Difference(f"quantisation: {back[at]:.9g} stands for {wide[at]:.9g}, allowed {allowed[at]:.3g}")
