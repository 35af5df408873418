"""Attention over all visible tokens in plain torch: the specification of `dense_attention`.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys /
values; `n` query tokens and `s` key columns of one block, `R = H / G` query heads that share a KV head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsa.ops.blocks import compute_dtype, full_precision
from dsa.ops.ranges import Block, VisibleRanges, fill_hidden


class Options(NamedTuple):
    """What is not a tensor: the factor on `q . k`, the softcap if any, and what each query sees."""

    scale: float
    softcap: float | None
    ranges: VisibleRanges


class DenseAttention(torch.autograd.Function):
    """Streams over blocks of queries; the backward pass recomputes the probabilities from `lse`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, _ = q.shape
        wide = compute_dtype(q)
        out = q.new_zeros(batch, tokens, heads, v.shape[-1])
        lse = torch.full((batch, tokens, heads), -torch.inf, dtype=wide, device=q.device)
        keys, values = k.to(wide), v.to(wide)
        for block in _blocks(q, k, v, options.ranges):
            hidden = options.ranges.hidden_within(block)
            for group, group_heads in _groups(q, k):
                place = (block.batch, block.rows, group_heads)
                scores, _ = _scores(q[place].to(wide), keys, group, block, hidden, options)
                top = scores.amax(dim=-1, keepdim=True)
                top = top.masked_fill(top == -torch.inf, 0.0)
                weights = scores.sub_(top).exp_()
                total = weights.sum(dim=-1)
                top = top.squeeze(-1)
                lse[place] = total.log() + top
                # What was mixed of nothing is zero, whatever the sink: its exponential alone may be anything.
                nothing = total == 0
                if sink_logits is not None:
                    total = total + (sink_logits[group_heads].to(wide) - top).exp()
                mixed = _matmul(weights, values[block.batch, block.columns, group])
                out[place] = (mixed / total.masked_fill(nothing, 1.0).unsqueeze(-1)).to(out.dtype)
        ctx.save_for_backward(q, k, v, sink_logits, lse)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink_logits, lse = ctx.saved_tensors
        options = ctx.options
        with full_precision(q.device):
            wide = lse.dtype
            keys, values = k.to(wide), v.to(wide)
            grad_q = torch.zeros(q.shape, dtype=wide, device=q.device)
            grad_k = torch.zeros(k.shape, dtype=wide, device=q.device)
            grad_v = torch.zeros(v.shape, dtype=wide, device=q.device)
            grad_sink = torch.zeros(q.shape[2], dtype=wide, device=q.device)
            normaliser = lse if sink_logits is None else torch.logaddexp(lse, sink_logits.to(wide))
            normaliser = normaliser.masked_fill(normaliser == -torch.inf, 0.0)
            for block in _blocks(q, k, v, options.ranges):
                hidden = options.ranges.hidden_within(block)
                for group, group_heads in _groups(q, k):
                    place = (block.batch, block.rows, group_heads)
                    columns = (block.batch, block.columns, group)
                    queries, grad = q[place].to(wide), grad_out[place].to(wide)
                    scores, slope = _scores(queries, keys, group, block, hidden, options)
                    weights = scores.sub_(normaliser[place].unsqueeze(-1)).exp_()
                    grad_v[columns] += _matmul_transposed(weights, grad)
                    grad_scores = _matmul(grad, values[columns].transpose(1, 2))
                    mean = (weights * grad_scores).sum(dim=-1, keepdim=True)
                    grad_scores.sub_(mean).mul_(weights)
                    if slope is not None:
                        grad_scores.mul_(slope)
                    grad_q[place] = _matmul(grad_scores, keys[columns]) * options.scale
                    grad_k[columns] += _matmul_transposed(grad_scores, queries * options.scale)
                    if sink_logits is not None:
                        share = (sink_logits[group_heads].to(wide) - normaliser[place]).exp()
                        grad_sink[group_heads] -= (share * mean.squeeze(-1)).sum(dim=(0, 1))
            return (
                grad_q.to(q.dtype) if ctx.needs_input_grad[0] else None,
                grad_k.to(k.dtype) if ctx.needs_input_grad[1] else None,
                grad_v.to(v.dtype) if ctx.needs_input_grad[2] else None,
                grad_sink.to(sink_logits.dtype) if ctx.needs_input_grad[3] else None,
                None,
            )


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    ranges: VisibleRanges,
) -> tuple[Tensor, Tensor]:
    """Arguments as in `api.dense_attention`, validated and resolved."""
    return DenseAttention.apply(q, k, v, sink_logits, Options(scale, softcap, ranges))


def _blocks(q: Tensor, k: Tensor, v: Tensor, ranges: VisibleRanges) -> Iterator[Block]:
    """Blocks of queries that see something.

    A key that one query sees and its neighbour does not takes part in the neighbour's matrix product with
    weight 0. That is nothing unless the key or value is not finite, `0 * NaN`: then each query goes alone.
    """
    wide = compute_dtype(q)
    # Anything that is not finite shows in the sum, which is cheaper than looking at each number.
    if q.shape[0] * q.shape[1] > 1 and not (k.sum(dtype=wide) + v.sum(dtype=wide)).isfinite():
        blocks = ranges.single_queries()
    else:
        shared = q.shape[2] // k.shape[2]
        blocks = ranges.blocks(q.shape[0] * shared * wide.itemsize)
    return (block for block in blocks if block.width)


def _groups(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice]]:
    """Each KV head with its query heads."""
    shared = q.shape[2] // k.shape[2]
    return ((group, slice(group * shared, (group + 1) * shared)) for group in range(k.shape[2]))


def _scores(
    q: Tensor, keys: Tensor, group: int, block: Block, hidden: list[tuple[slice, Tensor]], options: Options
) -> tuple[Tensor, Tensor | None]:
    """Scores `[B, n, R, s]`, `-inf` where hidden, and the softcap's derivative where there is one."""
    scores = _matmul(q * options.scale, keys[block.batch, block.columns, group].transpose(1, 2))
    slope = None
    if options.softcap is not None:
        scores.div_(options.softcap).tanh_()
        slope = 1 - scores * scores
        scores.mul_(options.softcap)
    fill_hidden(scores, hidden, -torch.inf)
    return scores, slope


def _matmul(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows[B, n, R, x] @ matrix[B, x, y]`, `[B, n, R, y]`."""
    return torch.bmm(rows.flatten(1, 2), matrix).view(*rows.shape[:3], matrix.shape[-1])


def _matmul_transposed(left: Tensor, right: Tensor) -> Tensor:
    """`left[B, n, R, x]^T @ right[B, n, R, y]` summed over `n` and `R`, `[B, x, y]`."""
    return torch.bmm(left.flatten(1, 2).transpose(1, 2), right.flatten(1, 2))
