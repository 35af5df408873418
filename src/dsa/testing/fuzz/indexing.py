"""Random calls of `index_topk`, over keys in one piece or in pages.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `Gs` selections of a query,
`K` top-k.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dsa.ops import index_topk, quantize_index_keys
from dsa.ops.paging.types import PagedKeys
from dsa.ops.quantize.types import QuantizedKeys
from dsa.testing.fuzz.draw import Difference, Draws, numbers
from dsa.testing.fuzz.quantizing import KEY_LEVELS, hadamard_rotated, to_levels
from dsa.testing.fuzz.softmax import EPS, SMALLEST

QUERY_LEVELS = 63


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
    several = draws.pick(((), (), (draws.whole(1, 4),)))
    if several:
        turns = draws.numbers.choice((-1.0, 0.0, 0.5, 1.0), (batch, tokens, *several, heads))
        w_given = draws.lay_out(w[:, :, None] * turns, w_given.dtype)
    draws.note(
        shape=f"B{batch} T{tokens} S{keys} Hi{heads} Di{dim} Gs{several} K{top_k}", sinks=sinks, local=local, kind=kind,
        whole=whole, dtype=dtype, scale=scale, paged=isinstance(stored, PagedKeys),
    )  # fmt: skip
    selection = index_topk(
        q_given, stored, w_given, top_k, scale=scale, sinks=sinks, local=local, key_start=start, key_end=end, impl=impl
    )
    factor = dim**-0.5 if scale is None else scale
    for part, weights in enumerate(w_given.unbind(2) if several else (w_given,)):
        scores, off = _scores(q_given, k_given, weights, factor, kind, impl == "reference")
        if whole and kind == "float" and scale == -1.0:
            off = np.zeros_like(off)
        rows = (selection[:, :, part] if several else selection).numpy()
        for b, t in np.ndindex(batch, tokens):
            first = 0 if start is None else int(start[b, t])
            last = max(keys - tokens + t + 1, 0) if end is None else int(end[b, t])
            what = f"query {b}, {t}, selection {part}"
            _judge(rows[b, t], np.arange(first, last), scores[b, t], off[b, t], top_k, sinks, local, what)


def _in_pages(draws: Draws, keys: QuantizedKeys) -> PagedKeys:
    batch, tokens, dim = keys.shape
    block = draws.pick((4, 16, 64))
    per_row = -(-tokens // block)
    pages = torch.from_numpy(draws.numbers.integers(0, 255, (batch * per_row + 1, block, dim + 4))).byte()
    table = torch.from_numpy(draws.numbers.permutation(len(pages))[: batch * per_row].reshape(batch, per_row)).int()
    paged = PagedKeys(pages, table, tokens, keys.dtype)
    paged.write(keys)
    return paged


def _scores(q: Tensor, k: Tensor, w: Tensor, scale: float, kind: str, wide: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scores `[B, T, S]` and how far each may be off. Those of int8 keys follow the documented roundings: no error.

    Args:
        wide: Whether products are summed in fp64, as the reference does, and not in fp32.
    """
    weights = w.detach().float().numpy()
    with np.errstate(all="ignore"):
        if kind == "int8":
            data, scales = to_levels(hadamard_rotated(k.float().numpy()), KEY_LEVELS)
            query, query_scales = to_levels(hadamard_rotated(q.float().numpy()), QUERY_LEVELS)
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
            queries = hadamard_rotated(q.float().numpy()).astype(np.float64)
        else:
            keys, queries = numbers(k), numbers(q)
        dots = np.einsum("bthd,bsd->bths", queries, keys)
        sizes = np.einsum("bthd,bsd->bths", np.abs(queries), np.abs(keys))
        # Rounded to fp32 once, as documented: what vanishes there is zero, times infinity too.
        passed = np.where(np.isnan(dots), np.nan, np.maximum(dots, 0)).astype(np.float32).astype(np.float64)
        factor = weights.astype(np.float64) * scale
        scores = np.einsum("bth,bths->bts", factor, passed)
        rounding = (q.shape[2] + 6) * EPS * np.einsum("bth,bths->bts", np.abs(factor), passed)
        summing = 1e-12 if wide else (q.shape[-1] / 2 + 6) * EPS
        # A head of weight 0 adds nothing, whatever its products are.
        sizes = np.where(factor[..., None] == 0, 0.0, sizes)
        off = rounding + summing * np.einsum("bth,bths->bts", np.abs(factor), sizes)
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
