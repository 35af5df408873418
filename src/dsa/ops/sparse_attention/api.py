"""Attention over selected tokens. Semantics and derivation: README.md."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dsa.ops import native_support, triton_support, vendor_support
from dsa.ops.blocks import full_precision
from dsa.ops.checks import check_attention, check_indices, check_scale, check_softcap, check_tensor, describe
from dsa.ops.packed_latents.gradient import without_gradient
from dsa.ops.packed_latents.types import PackedLatents
from dsa.ops.paging.types import PagedLatents
from dsa.ops.per_selection import check_selected, parts_of
from dsa.ops.sparse_attention import reference, vendor
from dsa.ops.types import Impl, resolve_impl

_OP = "sparse_attention"


def sparse_attention(
    q: Tensor,
    k: Tensor | PackedLatents | PagedLatents,
    v: Tensor | None,
    indices: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each query over the tokens selected for it (arXiv 2512.02556, eq. 2).

    All heads of a query read the same tokens, or each selection's heads their own. Differentiable in
    `q, k, v, sink_logits`; the backward pass recomputes, so memory is `O((T + S) * heads + block)`. Accumulation is
    fp32, fp64 for fp64 queries.

    Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of
    keys / values, `Gs` selections of a query, `K` selected tokens.

    Args:
        q: `[B, T, H, D]`, any strides.
        k: `[B, S, G, D]`, `G` a divisor of `H`; may be narrower in dtype than `q`. Query head `h` reads KV
            head `h // (H / G)`. Or FP8 rows of MLA, one after the other or in pages: `D = L + R`, read where they lie
            and decoded as they are read. They pass no gradient, and the backward pass says so.
        v: `[B, S, G, Dv]`; may be narrower than `q`, and a view into `k` (MLA: `v = k[..., :Dv]`). `None` with FP8
            rows, whose first `L = Dv` numbers are the values.
        indices: Integers `[B, T, K]` in `[-1, S)`, any order; `-1` is skipped wherever it stands. A position
            that stands twice counts twice. Or `[B, T, Gs, K]`, `Gs` a divisor of `G`: KV head `g` and its query heads
            read selection `g // (G / Gs)`.
        scale: Factor on `q . k`; `None` means `D**-0.5`.
        softcap: Scores become `softcap * tanh(score / softcap)`, after `scale`.
        sink_logits: `[H]`: one more logit per head in the softmax's denominator, without a value.
        impl: Which implementation runs; an explicit choice never falls back.

    Returns:
        out: `[B, T, H, Dv]` in the dtype of `q`; zeros where nothing is selected.
        lse: fp32 (fp64 for fp64 queries) `[B, T, H]`: natural logarithm of the sum of the exponentials of the
            selected tokens' scores, without the sink; `-inf` where nothing is selected. Not differentiable.

    Raises:
        TypeError: An argument of the wrong type or kind of dtype, or `k` or `v` wider than `q`.
        ValueError: Shapes or devices that do not fit, an index outside `[-1, S)`, or an entry of the block table that
            an index needs and that is not a page; nothing is read then. On GPUs such an index is skipped, without
            waiting for the device to look; `DSA_CHECK_INDICES=1` makes it raise there too.
        NotImplementedError: The implementation asked for cannot run this input.
    """
    if isinstance(k, PackedLatents | PagedLatents):
        return _over_packed(q, k, v, indices, scale, softcap, sink_logits, impl)
    if v is None:
        raise TypeError(f"{_OP}: v must be a tensor [B, S, G, Dv] unless k is PackedLatents or PagedLatents, got None")
    check_attention(_OP, q, k, v, sink_logits, softcap)
    head_dim = q.shape[-1]
    check_selected(_OP, indices, q, k.shape[2])
    scale = check_scale(_OP, "scale", scale, head_dim**-0.5)
    if indices.ndim == 4:
        return _each_selection(q, k, v, indices, scale, softcap, sink_logits, impl)
    native_gap = native_support.gap(q, k, v, sink_logits)
    if impl == "auto" and native_gap is None:
        return _run("native", q, k, v, indices, scale, softcap, sink_logits)
    gaps = triton_support.with_triton({"native": native_gap, "reference": None}, q, k, v, sink_logits)
    chosen = _resolve(impl, gaps, q, k, v, indices, scale, softcap, sink_logits)
    return _run(chosen, q, k, v, indices, scale, softcap, sink_logits)


def _each_selection(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """The same over `indices` `[B, T, Gs, K]`: the heads of each selection for themselves."""
    selections = indices.shape[2]
    heads = zip(*(parts_of(x, 2, selections) for x in (q, k, v)), indices.unbind(2))
    sinks = [None] * selections if sink_logits is None else parts_of(sink_logits, 0, selections)
    done = [
        sparse_attention(*part, scale=scale, softcap=softcap, sink_logits=sink, impl=impl)
        for part, sink in zip(heads, sinks)
    ]
    return torch.cat([out for out, _ in done], dim=2), torch.cat([lse for _, lse in done], dim=2)


def _resolve(
    impl: str,
    gaps: dict[str, str | None],
    q: Tensor,
    k: Tensor | PackedLatents | PagedLatents,
    v: Tensor | None,
    indices: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> str:
    """The implementation to run; `auto` takes the vendor's where that was measured to be faster than the first able."""
    if vendor_support.considered(impl):
        gaps["vendor"] = vendor.gap(q, k, v, softcap, sink_logits, indices.shape[-1])
    chosen = resolve_impl(_OP, impl, gaps)
    if impl == "auto" and gaps.get("vendor", "") is None:
        form = type(k).__name__, q.shape[0], q.shape[1].bit_length(), q.shape[2], indices.shape[-1]
        run = _run if isinstance(k, Tensor) else _run_packed
        runs = {
            name: partial(run, name, q, k, v, indices, scale, softcap, sink_logits)  # type: ignore[arg-type]
            for name in (chosen, "vendor")
        }
        return vendor_support.faster(_OP, vendor.LIBRARY, form, q.device, chosen, runs)
    return chosen


def _run(
    chosen: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One implementation that can take the arguments."""
    if chosen == "native":
        from dsa.ops.sparse_attention import native

        return native.sparse_attention(q, k, v, indices, scale=scale, softcap=softcap, sink_logits=sink_logits)
    if chosen in ("triton", "vendor"):
        if triton_support.checks_indices():
            check_indices(_OP, indices, k.shape[1])
        if chosen == "vendor":
            return vendor.attend(q, k, indices, scale=scale, sink_logits=sink_logits)
        from dsa.ops.sparse_attention import triton

        return triton.sparse_attention(q, k, v, indices, scale=scale, softcap=softcap, sink_logits=sink_logits)
    padded = check_indices(_OP, indices, k.shape[1])
    with full_precision(q.device):
        return reference.sparse_attention(
            q, k, v, indices, scale=scale, softcap=softcap, sink_logits=sink_logits, padded=padded
        )


def _row_gap(rows: PackedLatents | PagedLatents) -> str | None:
    """Why the Triton kernel cannot read rows of this form, or `None` where it can."""
    data = rows.pages if isinstance(rows, PagedLatents) else rows.data
    if rows.latent_dim % 4 or data.shape[-1] % 4:
        return (
            f"the kernel reads rows whose scales lie at multiples of four bytes, got {data.shape[-1]} bytes with "
            f"latent_dim={rows.latent_dim}"
        )
    return None


def _over_packed(
    q: Tensor,
    k: PackedLatents | PagedLatents,
    v: Tensor | None,
    indices: Tensor,
    scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """The same over FP8 rows."""
    check_softcap(_OP, softcap)
    batch, _, width = k.shape
    check_tensor(_OP, "q", q, "[B, T, H, L + R]", (batch, None, None, width), device=k.device)
    heads = q.shape[2]
    if heads == 0:
        raise ValueError(f"{_OP}: q must have at least one head, got {describe(q)}")
    if v is not None:
        raise TypeError(
            f"{_OP}: v must be None where k is {type(k).__name__}, whose latents are the values, got {describe(v)}"
        )
    if sink_logits is not None:
        check_tensor(_OP, "sink_logits", sink_logits, "[H]", (heads,), device=q.device)
    check_selected(_OP, indices, q, groups=1)
    indices = indices.flatten(2)
    scale = check_scale(_OP, "scale", scale, width**-0.5)
    gaps = triton_support.with_triton({"native": native_support.gap(q, sink_logits), "reference": None}, q, sink_logits)
    if gaps["triton"] is None:
        gaps["triton"] = _row_gap(k)
    chosen = _resolve(impl, gaps, q, k, None, indices, scale, softcap, sink_logits)
    with torch.no_grad():
        out, lse = _run_packed(chosen, q, k, None, indices, scale, softcap, sink_logits)
    return without_gradient(out, q, sink_logits), lse


def _run_packed(
    chosen: str,
    q: Tensor,
    k: PackedLatents | PagedLatents,
    v: None,
    indices: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One implementation that can take FP8 rows."""
    if chosen in ("triton", "vendor"):
        if triton_support.checks_indices():
            check_indices(_OP, indices, k.shape[1])
            if isinstance(k, PagedLatents):
                k.physical(indices)
        if chosen == "vendor":
            return vendor.attend(q, k, indices, scale=scale, sink_logits=sink_logits)
        from dsa.ops.sparse_attention import triton_packed

        return triton_packed.packed_attention(q, k, indices, scale=scale, softcap=softcap, sink_logits=sink_logits)
    rows = k
    if isinstance(k, PagedLatents):
        rows, indices = k.pool(), k.physical(indices)
    assert isinstance(rows, PackedLatents)
    with full_precision(q.device):
        if chosen == "native":
            from dsa.ops.sparse_attention import native

            return native.packed_attention(q, rows, indices, scale=scale, softcap=softcap, sink_logits=sink_logits)
        padded = check_indices(_OP, indices, rows.shape[1])
        return reference.packed_attention(
            q, rows, indices, scale=scale, softcap=softcap, sink_logits=sink_logits, padded=padded
        )
