"""Attention over selected tokens in plain torch: the specification of `sparse_attention`.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys /
values, `K` selected tokens; `n` query tokens of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsa.ops.blocks import compute_dtype, full_precision, rows_per_block
from dsa.ops.packed_latents.types import PackedLatents, decode_rows
from dsa.ops.selected import gather_tokens, mix_per_group, scatter_tokens, scores_per_group, spread_per_group


class Options(NamedTuple):
    """What is not a tensor: the factor on `q . k`, the softcap if any, and whether some index is `-1`."""

    scale: float
    softcap: float | None
    padded: bool


class SparseAttention(torch.autograd.Function):
    """Streams over blocks of queries; the backward pass recomputes the probabilities from `lse`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        sink_logits: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, _ = q.shape
        wide = compute_dtype(q)
        out = q.new_zeros(batch, tokens, heads, v.shape[-1])
        lse = torch.full((batch, tokens, heads), -torch.inf, dtype=wide, device=q.device)
        if k.shape[1] and indices.shape[-1]:
            for b, rows in _blocks(q, k.shape[2] * (k.shape[3] + v.shape[3]), indices):
                keys, values, hidden = _gather(k[b], v[b], indices[b, rows], wide, options.padded)
                mixed, lse[b, rows] = _attend(q[b, rows].to(wide), keys, values, hidden, sink_logits, options)
                out[b, rows] = mixed.to(out.dtype)
        ctx.save_for_backward(q, k, v, indices, sink_logits, lse)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, indices, sink_logits, lse = ctx.saved_tensors
        options = ctx.options
        with full_precision(q.device):
            wide = lse.dtype
            grad_q = torch.zeros(q.shape, dtype=wide, device=q.device)
            grad_k = torch.zeros(k.shape, dtype=wide, device=q.device)
            grad_v = torch.zeros(v.shape, dtype=wide, device=q.device)
            grad_sink = torch.zeros(q.shape[2], dtype=wide, device=q.device)
            normaliser = lse if sink_logits is None else torch.logaddexp(lse, sink_logits.to(wide))
            normaliser = normaliser.masked_fill(normaliser == -torch.inf, 0.0)
            if k.shape[1] and indices.shape[-1]:
                for b, rows in _blocks(q, k.shape[2] * (k.shape[3] + v.shape[3]), indices):
                    queries, grad = q[b, rows].to(wide), grad_out[b, rows].to(wide)
                    keys, values, hidden = _gather(k[b], v[b], indices[b, rows], wide, options.padded)
                    scores, slope = _scores(queries, keys, hidden, options)
                    weights = scores.sub_(normaliser[b, rows].unsqueeze(-1)).exp_()
                    grad_weights = scores_per_group(grad, values)
                    mean = (weights * grad_weights).sum(dim=-1, keepdim=True)
                    grad_scores = grad_weights.sub_(mean).mul_(weights)
                    if slope is not None:
                        grad_scores.mul_(slope)
                    grad_scores.mul_(options.scale)
                    grad_q[b, rows] = mix_per_group(grad_scores, keys)
                    for total, factor, rows_of in ((grad_k, grad_scores, queries), (grad_v, weights, grad)):
                        spread = spread_per_group(factor, rows_of, k.shape[2])
                        scatter_tokens(total[b], indices[b, rows], spread)
                    if sink_logits is not None:
                        share = (sink_logits.to(wide) - normaliser[b, rows]).exp()
                        grad_sink -= (share * mean.squeeze(-1)).sum(dim=0)
            return (
                grad_q.to(q.dtype) if ctx.needs_input_grad[0] else None,
                grad_k.to(k.dtype) if ctx.needs_input_grad[1] else None,
                grad_v.to(v.dtype) if ctx.needs_input_grad[2] else None,
                None,
                grad_sink.to(sink_logits.dtype) if ctx.needs_input_grad[4] else None,
                None,
            )


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    padded: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments as in `api.sparse_attention`, validated; `padded` says whether some index is `-1`."""
    return SparseAttention.apply(q, k, v, indices, sink_logits, Options(scale, softcap, padded))


def packed_attention(
    q: Tensor,
    rows: PackedLatents,
    indices: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    padded: bool,
) -> tuple[Tensor, Tensor]:
    """The same over rows of eight bits, decoded as they are gathered: one KV head, whose values are the latents."""
    batch, tokens, heads, width = q.shape
    wide, options = compute_dtype(q), Options(scale, softcap, padded)
    out = q.new_zeros(batch, tokens, heads, rows.latent_dim)
    lse = torch.full((batch, tokens, heads), -torch.inf, dtype=wide, device=q.device)
    if rows.shape[1] and indices.shape[-1]:
        for b, some in _blocks(q, 2 * (width + rows.latent_dim), indices):
            places = indices[b, some]
            hidden = places < 0 if padded else None
            data = rows.data[b].index_select(0, places.clamp_min(0).flatten()).view(*places.shape, -1)
            keys = decode_rows(data, rows.latent_dim, rows.rope_dim).to(wide)
            if hidden is not None:
                keys.masked_fill_(hidden.unsqueeze(-1), 0.0)
            keys = keys.unsqueeze(2)
            values = keys[..., : rows.latent_dim]
            mixed, lse[b, some] = _attend(q[b, some].to(wide), keys, values, hidden, sink_logits, options)
            out[b, some] = mixed.to(out.dtype)
    return out, lse


def _blocks(q: Tensor, gathered: int, indices: Tensor) -> Iterator[tuple[int, slice]]:
    """Batch row and query tokens of each block, sized by the `gathered` numbers of a selected token."""
    batch, tokens, heads, _ = q.shape
    per_selected = gathered + 2 * heads
    size = rows_per_block(indices.shape[-1] * per_selected * compute_dtype(q).itemsize, q.device)
    for b in range(batch):
        for row in range(0, tokens, size):
            yield b, slice(row, min(row + size, tokens))


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, sink_logits: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """One block: what its queries `[n, H, D]` mix, `[n, H, Dv]`, and their `lse` `[n, H]`."""
    scores, _ = _scores(q, keys, hidden, options)
    top = scores.amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(dim=-1)
    top = top.squeeze(-1)
    lse = total.log() + top
    # What was mixed of nothing is zero, whatever the sink: its exponential alone may be anything.
    nothing = total == 0
    if sink_logits is not None:
        total = total + (sink_logits.to(q.dtype) - top).exp()
    mixed = mix_per_group(weights, values)
    return mixed / total.masked_fill(nothing, 1.0).unsqueeze(-1), lse


def _gather(
    k: Tensor, v: Tensor, indices: Tensor, wide: torch.dtype, padded: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows `[n, K, G, D]` of `k`, `[n, K, G, Dv]` of `v`, and the mask `[n, K]` of padding if any."""
    hidden = indices < 0 if padded else None
    return gather_tokens(k, indices, hidden, wide), gather_tokens(v, indices, hidden, wide), hidden


def _scores(q: Tensor, keys: Tensor, hidden: Tensor | None, options: Options) -> tuple[Tensor, Tensor | None]:
    """Scores `[n, H, K]`, `-inf` where hidden, and the softcap's derivative where there is one."""
    scores = scores_per_group(q * options.scale, keys)
    slope = None
    if options.softcap is not None:
        scores.div_(options.softcap).tanh_()
        slope = 1 - scores * scores
        scores.mul_(options.softcap)
    if hidden is not None:
        scores.masked_fill_(hidden.unsqueeze(1), -torch.inf)
    return scores, slope
