"""Attention over all visible tokens. Semantics and derivation: README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa.ops import native_support
from dsa.ops.blocks import full_precision
from dsa.ops.checks import check_attention, check_scale
from dsa.ops.dense_attention import reference
from dsa.ops.ranges import resolve_ranges
from dsa.ops.types import Impl, resolve_impl

_OP = "dense_attention"


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each query over its visible range: `sparse_attention` with everything selected.

    Differentiable in `q, k, v, sink_logits`; the backward pass recomputes, so memory is
    `O((T + S) * heads + block)`. Accumulation is fp32, fp64 for fp64 queries.

    Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of
    keys / values.

    Args:
        q: `[B, T, H, D]`, any strides.
        k: `[B, S, G, D]`, `G` a divisor of `H`; may be narrower in dtype than `q`. Query head `h` reads KV
            head `h // (H / G)`.
        v: `[B, S, G, Dv]`; may be narrower than `q`, and a view into `k`.
        scale: Factor on `q . k`; `None` means `D**-0.5`.
        softcap: Scores become `softcap * tanh(score / softcap)`, after `scale`.
        sink_logits: `[H]`: one more logit per head in the softmax's denominator, without a value.
        key_start: First visible key of each query, integers `[B, T]` in `[0, S]`; `None` means 0.
        key_end: One past the last visible key, integers `[B, T]` in `[0, S]`; `None` means `S - T + t + 1`:
            causal, right-aligned.
        impl: Which implementation runs; an explicit choice never falls back.

    Returns:
        out: `[B, T, H, Dv]` in the dtype of `q`; zeros where nothing is visible.
        lse: fp32 (fp64 for fp64 queries) `[B, T, H]`: natural logarithm of the sum of the exponentials of the
            visible tokens' scores, without the sink; `-inf` where nothing is visible. Not differentiable.

    Raises:
        TypeError: An argument of the wrong type or kind of dtype, or `k` or `v` wider than `q`.
        ValueError: Shapes, devices or ranges that do not fit.
        NotImplementedError: The implementation asked for cannot run this input.
    """
    check_attention(_OP, q, k, v, sink_logits, softcap)
    batch, tokens, _, head_dim = q.shape
    scale = check_scale(_OP, "scale", scale, head_dim**-0.5)
    native_gap = native_support.gap(q, k, v, sink_logits)
    if resolve_impl(_OP, impl, {"native": native_gap, "reference": None}) == "native":
        from dsa.ops.dense_attention import native

        if key_start is not None or key_end is not None:
            ranges = resolve_ranges(_OP, key_start, key_end, batch, tokens, k.shape[1], q.device)
            key_start, key_end = ranges.host_start.to(torch.int32), ranges.host_end.to(torch.int32)
        options = native.Options(scale, softcap, key_start, key_end)
        return native.dense_attention(q, k, v, sink_logits=sink_logits, options=options)
    ranges = resolve_ranges(_OP, key_start, key_end, batch, tokens, k.shape[1], q.device)
    with full_precision(q.device):
        return reference.dense_attention(q, k, v, scale=scale, softcap=softcap, sink_logits=sink_logits, ranges=ranges)
