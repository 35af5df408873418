"""Lightning indexer and top-k selection. Semantics and derivation: README.md."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsa.ops import native_support, triton_support, vendor_support
from dsa.ops.blocks import full_precision
from dsa.ops.checks import check_count, check_scale, check_tensor, describe
from dsa.ops.index_topk import reference, vendor
from dsa.ops.paging.types import PagedKeys
from dsa.ops.quantize.types import QuantizedKeys
from dsa.ops.ranges import resolve_ranges
from dsa.ops.types import Impl, resolve_impl

_OP = "index_topk"

_TRITON_LARGEST_DIM = 256
_NATIVE_LARGEST_DIM = 1 << 16


def index_topk(
    q: Tensor,
    k: Tensor | QuantizedKeys | PagedKeys,
    w: Tensor,
    top_k: int,
    *,
    scale: float | None = None,
    sinks: int = 0,
    local: int = 0,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Scores every visible token with the lightning indexer and selects the best (arXiv 2512.02556, eq. 1-2).

    `score[t, s] = scale * sum_j w[t, j] * relu(q[t, j] . k[s])`. Nothing of size `T x S` is kept, and no
    gradient passes. Queries that see at most `K` tokens select all of them without scoring.

    Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `Gs` selections of a
    query, `K` top-k.

    Args:
        q: Index queries `[B, T, Hi, Di]`, any strides.
        k: Index keys `[B, S, Di]`, or `QuantizedKeys` of that shape. With int8 keys the queries are quantised
            too and the dot products are exact integers, so the selection is the same everywhere. `PagedKeys` are
            brought into one piece first (read in their pages by the Triton kernels); the selection is that of
            positions in the sequences.
        w: Head weights `[B, T, Hi]`, or `[B, T, Gs, Hi]` for `Gs` selections of each query, which weigh the same dot
            products differently. The Triton kernels and the vendor's compute the products for each selection.
        top_k: `K`, at least 1.
        scale: Factor on the scores; `None` means `Di**-0.5`.
        sinks: How many of the first visible tokens are always selected; they count towards `top_k`.
        local: How many of the last visible tokens are always selected; they count towards `top_k`.
        key_start: First visible key of each query, integers `[B, T]` in `[0, S]`; `None` means 0.
        key_end: One past the last visible key, integers `[B, T]` in `[0, S]`; `None` means `S - T + t + 1`:
            causal, right-aligned.
        impl: Which implementation runs; an explicit choice never falls back.

    Returns:
        int32 `[B, T, K]`, or `[B, T, Gs, K]`: positions among the `S` keys, ascending, padded at the end with `-1`.
        Among equal scores the most recent token wins; `-0.0` equals `0.0`. A NaN score ranks below every number,
        above tokens that are not visible.

    Raises:
        TypeError: An argument of the wrong type or kind of dtype.
        ValueError: Shapes, devices or ranges that do not fit, `sinks + local > top_k`, or an entry of the block table
            that is needed and is not a page. The Triton kernels do not read such a page, and its tokens score 0,
            without waiting for the device to look; `DSA_CHECK_INDICES=1` makes them raise too.
        NotImplementedError: The implementation asked for cannot run this input.
    """
    check_tensor(_OP, "q", q, "[B, T, Hi, Di]", (None,) * 4)
    batch, tokens, heads, head_dim = q.shape
    if heads == 0 or head_dim == 0:
        raise ValueError(f"{_OP}: q must have at least one head and one dim, got {describe(q)}")
    if isinstance(k, QuantizedKeys | PagedKeys):
        if (k.shape[0], k.shape[2]) != (batch, head_dim):
            raise ValueError(f"{_OP}: k must be [B, S, Di] = [{batch}, any, {head_dim}], got {list(k.shape)}")
        if k.device != q.device:
            raise ValueError(f"{_OP}: k must be on {q.device} like the queries, got {k.device}; use k.to()")
    else:
        check_tensor(_OP, "k", k, "[B, S, Di]", (batch, None, head_dim), device=q.device)
    if isinstance(w, Tensor) and w.ndim == 4:
        check_tensor(_OP, "w", w, "[B, T, Gs, Hi]", (batch, tokens, None, heads), device=q.device)
        if w.shape[2] == 0:
            raise ValueError(f"{_OP}: w must be for at least one selection, got {describe(w)}")
    else:
        check_tensor(_OP, "w", w, "[B, T, Hi]", (batch, tokens, heads), device=q.device)
    check_count(_OP, "top_k", top_k, 1)
    check_count(_OP, "sinks", sinks, 0)
    check_count(_OP, "local", local, 0)
    if sinks + local > top_k:
        raise ValueError(
            f"{_OP}: sinks + local must be at most top_k, which they count towards: got sinks={sinks}, "
            f"local={local}, top_k={top_k}; raise top_k or lower local"
        )
    scale = check_scale(_OP, "scale", scale, head_dim**-0.5)
    options = {"scale": scale, "sinks": sinks, "local": local, "key_start": key_start, "key_end": key_end}
    native_gap = _native_gap(q, k, w)
    if impl == "auto" and native_gap is None:
        return _run("native", q, k, w, top_k, options)
    gaps = triton_support.with_triton({"native": native_gap, "reference": None}, *_floating(q, k, w))
    if gaps["triton"] is None and head_dim > _TRITON_LARGEST_DIM:
        gaps["triton"] = f"the kernels take index heads of at most {_TRITON_LARGEST_DIM} dims, got {head_dim}"
    if vendor_support.considered(impl):
        gaps["vendor"] = vendor.gap(q, k)
    chosen = resolve_impl(_OP, impl, gaps)
    if impl == "auto" and gaps.get("vendor", "") is None:
        shape = batch, tokens.bit_length(), k.shape[1].bit_length(), heads, head_dim, w.shape[2:-1], top_k
        runs = {name: partial(_run, name, q, k, w, top_k, options) for name in (chosen, "vendor")}
        chosen = vendor_support.faster(_OP, vendor.LIBRARY, shape, q.device, chosen, runs)
    return _run(chosen, q, k, w, top_k, options)


def _run(
    chosen: str, q: Tensor, k: Tensor | QuantizedKeys | PagedKeys, w: Tensor, top_k: int, options: dict[str, Any]
) -> Tensor:
    """One implementation that can take the arguments."""
    if w.ndim == 4 and chosen in ("triton", "vendor"):
        return torch.stack([_run(chosen, q, k, part, top_k, options) for part in w.unbind(2)], dim=2)
    if chosen == "triton":
        from dsa.ops.index_topk import triton

        if isinstance(k, PagedKeys) and triton_support.checks_indices():
            k.gather()
        with torch.no_grad():
            return triton.index_topk(q, k, w, top_k, **options)
    if isinstance(k, PagedKeys):
        k = k.gather()
    if chosen == "native":
        from dsa.ops.index_topk import native

        return native.index_topk(q, k, w, top_k, **options)
    edges = options["key_start"], options["key_end"]
    options = {name: value for name, value in options.items() if name not in ("key_start", "key_end")}
    with torch.no_grad():
        ranges = resolve_ranges(_OP, *edges, q.shape[0], q.shape[1], k.shape[1], q.device)
        if chosen == "vendor":
            assert isinstance(k, QuantizedKeys)
            return vendor.index_topk(q, k, w, top_k, ranges=ranges, **options)
        with full_precision(q.device):
            return reference.index_topk(q, k, w, top_k, ranges=ranges, **options)


def _floating(q: Tensor, k: Tensor | QuantizedKeys | PagedKeys, w: Tensor) -> tuple[Tensor | None, ...]:
    return q, w, k if isinstance(k, Tensor) else None


def _native_gap(q: Tensor, k: Tensor | QuantizedKeys | PagedKeys, w: Tensor) -> str | None:
    """Why the compiled kernel cannot take these arguments, or `None` where it can."""
    if q.shape[-1] > _NATIVE_LARGEST_DIM:
        return f"the kernel takes index heads of at most {_NATIVE_LARGEST_DIM} dims, got {q.shape[-1]}"
    return native_support.gap(*_floating(q, k, w))
