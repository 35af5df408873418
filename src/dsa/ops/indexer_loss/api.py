"""Training signal of the indexer. Semantics and derivation: README.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsa.ops import native_support, triton_support
from dsa.ops.checks import check_attention, check_count, check_indices, check_scale, check_tensor, describe
from dsa.ops.indexer_loss import reference
from dsa.ops.per_selection import check_selected, check_selections, parts_of
from dsa.ops.ranges import resolve_ranges
from dsa.ops.types import Impl, resolve_impl

_OP = "indexer_loss"


def indexer_loss(
    q_index: Tensor,
    k_index: Tensor,
    w_index: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    indices: Tensor | None = None,
    index_scale: float | None = None,
    attention_scale: float | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    query_mask: Tensor | None = None,
    sinks: int = 0,
    local: int = 0,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """`KL(p || softmax(I))`, averaged over queries (arXiv 2512.02556, eq. 3 and 4).

    `p` is the main attention summed over its heads and L1-normalised, `I` the index scores. Of several selections each
    has the heads that read it for its target, and the mean of their losses is the loss. Differentiable
    once, in the three index tensors only; `q`, `k` and `sink_logits` are constants. Nothing of size `T x S`
    is kept: memory is `O(T + S + block)`.

    Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `H`/`G`
    query / KV heads, `D` head dim, `Gs` selections of a query, `K` selected tokens.

    Args:
        q_index: `[B, T, Hi, Di]`. `T` may be any subset of a sequence's queries, given their ranges.
        k_index: `[B, S, Di]`.
        w_index: `[B, T, Hi]`, or `[B, T, Gs, Hi]` for `Gs` selections, a divisor of `G`: selection `i` is compared with
            the `i`-th part of the KV heads and their query heads.
        q: Queries of the main attention `[B, T, H, D]`.
        k: Keys of the main attention `[B, S, G, D]`, `G` a divisor of `H`.
        indices: Integers `[B, T, K]` in `[-1, S)`: both distributions are over these tokens (eq. 4), the main
            attention's heads being normalised over them too. `-1` and positions outside the visible range are
            skipped. `None` takes all visible tokens (eq. 3). `[B, T, Gs, K]` where the weights are for `Gs` selections.
        index_scale: Factor on the index scores; `None` means `Di**-0.5`.
        attention_scale: Factor on `q . k`; `None` means `D**-0.5`.
        key_start: First visible key of each query, integers `[B, T]` in `[0, S]`; `None` means 0.
        key_end: One past the last visible key, integers `[B, T]` in `[0, S]`; `None` means `S - T + t + 1`.
        query_mask: bool `[B, T]`, the queries that count; `None` means all.
        sinks: How many of the first visible tokens both distributions leave out, being renormalised over the
            rest: tokens that are selected anyway teach nothing.
        local: How many of the last visible tokens both distributions leave out.
        softcap: On the main attention's scores.
        sink_logits: `[H]`, in the denominators of the main attention's heads: a head whose mass lies on its
            sink adds less to `p`.
        impl: Which implementation runs; an explicit choice never falls back.

    Returns:
        Scalar, fp32 (fp64 for fp64 `q_index`): the mean over the queries that count, 0 if none does. A query
        with nothing left to compare does not count.

    Raises:
        TypeError: An argument of the wrong type or kind of dtype.
        ValueError: Shapes, devices or ranges that do not fit, or an index outside `[-1, S)`. The Triton kernels skip
            such an index without waiting for the device to look; `DSA_CHECK_INDICES=1` makes it raise there too.
        NotImplementedError: The implementation asked for cannot run this input.
    """
    check_attention(_OP, q, k, None, sink_logits, softcap)
    batch, tokens, _, head_dim = q.shape
    keys, device = k.shape[1], q.device
    check_tensor(_OP, "q_index", q_index, "[B, T, Hi, Di]", (batch, tokens, None, None), device=device)
    index_heads, index_dim = q_index.shape[2:]
    if index_heads == 0 or index_dim == 0:
        raise ValueError(f"{_OP}: q_index must have at least one head and one dim, got {describe(q_index)}")
    check_tensor(_OP, "k_index", k_index, "[B, S, Di]", (batch, keys, index_dim), device=device)
    several = _check_weights(w_index, indices, q, k, index_heads)
    if query_mask is not None and (
        not isinstance(query_mask, Tensor)
        or query_mask.dtype != torch.bool
        or query_mask.shape != (batch, tokens)
        or query_mask.device != device
    ):
        raise ValueError(
            f"{_OP}: query_mask must be bool [B, T] = [{batch}, {tokens}] on {device}, "
            f"got {describe(query_mask)}; make it with torch.bool"
        )
    check_count(_OP, "sinks", sinks, 0)
    check_count(_OP, "local", local, 0)
    index_scale = check_scale(_OP, "index_scale", index_scale, index_dim**-0.5)
    attention_scale = check_scale(_OP, "attention_scale", attention_scale, head_dim**-0.5)
    if several:
        same: dict[str, Any] = {
            "index_scale": index_scale,
            "attention_scale": attention_scale,
            "key_start": key_start,
            "key_end": key_end,
            "query_mask": query_mask,
            "sinks": sinks,
            "local": local,
            "softcap": softcap,
            "impl": impl,
        }
        return _each_selection(q_index, k_index, w_index, q, k, indices, sink_logits, same)
    floating = (q, k, sink_logits, q_index, k_index, w_index)
    gaps = triton_support.with_triton({"native": native_support.gap(*floating), "reference": None}, *floating)
    chosen = resolve_impl(_OP, impl, gaps)
    if indices is not None and (chosen != "triton" or triton_support.checks_indices()):
        check_indices(_OP, indices, keys)
    if chosen == "triton":
        from dsa.ops.indexer_loss import triton

        options = triton.Options(index_scale, attention_scale, softcap, sinks, local)
        return triton.indexer_loss(
            q_index, k_index, w_index, q, k, sink_logits, indices, key_start, key_end, query_mask, options
        )
    visible = resolve_ranges(_OP, key_start, key_end, batch, tokens, keys, device)
    if query_mask is not None:
        visible = visible.only(query_mask.cpu())
    constants: dict[str, Any] = {
        "q": q.detach(),
        "k": k.detach(),
        "sink_logits": None if sink_logits is None else sink_logits.detach(),
        "indices": indices,
        "index_scale": index_scale,
        "attention_scale": attention_scale,
        "softcap": softcap,
        "visible": visible,
    }
    if chosen == "native":
        from dsa.ops.indexer_loss import native

        return native.indexer_loss(q_index, k_index, w_index, native.Constants(**constants, sinks=sinks, local=local))
    inputs = reference.LossInputs(**constants, kept=visible.shrink(sinks, local))
    return reference.indexer_loss(q_index, k_index, w_index, inputs)


def _check_weights(w_index: Tensor, indices: Tensor | None, q: Tensor, k: Tensor, index_heads: int) -> bool:
    """Checks the head weights and the indices; says whether they are for several selections, with a dim for these."""
    batch, tokens = q.shape[:2]
    several = isinstance(w_index, Tensor) and w_index.ndim == 4
    if several:
        check_tensor(_OP, "w_index", w_index, "[B, T, Gs, Hi]", (batch, tokens, None, index_heads), device=q.device)
        check_selections(_OP, "w_index", w_index, k.shape[2])
    else:
        check_tensor(_OP, "w_index", w_index, "[B, T, Hi]", (batch, tokens, index_heads), device=q.device)
    if indices is not None:
        check_selected(_OP, indices, q, k.shape[2])
        if indices.shape[2:-1] != w_index.shape[2:-1]:
            raise ValueError(
                f"{_OP}: indices and w_index must be for the same selections, got indices {describe(indices)} and "
                f"w_index {describe(w_index)}"
            )
    return several


def _each_selection(
    q_index: Tensor,
    k_index: Tensor,
    w_index: Tensor,
    q: Tensor,
    k: Tensor,
    indices: Tensor | None,
    sink_logits: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """The mean over the selections, each with the heads that read it."""
    selections = w_index.shape[2]
    sinks = None if sink_logits is None else parts_of(sink_logits, 0, selections)
    heads = zip(w_index.unbind(2), parts_of(q, 2, selections), parts_of(k, 2, selections))
    losses = [
        indexer_loss(
            q_index,
            k_index,
            weight,
            *own,
            indices=None if indices is None else indices[:, :, i],
            sink_logits=None if sinks is None else sinks[i],
            **options,
        )
        for i, (weight, *own) in enumerate(heads)
    ]
    return torch.stack(losses).mean()
