"""KL divergence of the indexer from the main attention in plain torch: the specification of `indexer_loss`.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `H`/`G` query /
KV heads, `D` head dim, `K` selected tokens; `n` query tokens and `s` keys of one block: columns, or the `K`
selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsa.ops.blocks import compute_dtype, full_precision, rows_per_block
from dsa.ops.indexer_loss.mass import least_mass
from dsa.ops.ranges import VisibleRanges, fill_hidden
from dsa.ops.selected import gather_tokens, scatter_tokens, scores_per_group


@dataclass(frozen=True)
class LossInputs:
    """All but the index tensors; see `api.indexer_loss`.

    Args:
        q: `[B, T, H, D]`.
        k: `[B, S, G, D]`.
        sink_logits: `[H]` or `None`.
        indices: `[B, T, K]` or `None` for all visible positions.
        index_scale: Factor on the index scores.
        attention_scale: Factor on `q . k`.
        softcap: On the attention scores, or `None`.
        visible: What each query of the mask sees; the others see nothing.
        kept: The part of `visible` that the loss compares: without sinks and local tokens.
    """

    q: Tensor
    k: Tensor
    sink_logits: Tensor | None
    indices: Tensor | None
    index_scale: float
    attention_scale: float
    softcap: float | None
    visible: VisibleRanges
    kept: VisibleRanges


class Sums:
    """What the stream over blocks adds up: the loss, the number of queries, and the three gradients."""

    def __init__(self, q_index: Tensor, k_index: Tensor, w_index: Tensor, wanted: bool) -> None:
        wide, device = compute_dtype(q_index), q_index.device
        self.loss = torch.zeros((), dtype=wide, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.wanted = wanted
        self.grads = tuple(
            torch.zeros(tensor.shape if wanted else (0,), dtype=wide, device=device)
            for tensor in (q_index, k_index, w_index)
        )


class IndexerLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, in the same sweep: the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, q_index: Tensor, k_index: Tensor, w_index: Tensor, inputs: LossInputs) -> Tensor:
        sums = Sums(q_index, k_index, w_index, any(ctx.needs_input_grad[:3]))
        stream = _stream_visible if inputs.indices is None else _stream_selected
        stream(q_index, k_index, w_index, inputs, sums)
        share = 1.0 / sums.count.clamp_min(1).to(sums.loss.dtype)
        if sums.wanted:
            index_tensors = (q_index, k_index, w_index)
            ctx.save_for_backward(*(grad.mul_(share).to(t.dtype) for grad, t in zip(sums.grads, index_tensors)))
        return sums.loss * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            grad * grad_loss.to(grad.dtype) if needed else None
            for grad, needed in zip(ctx.saved_tensors, ctx.needs_input_grad)
        )
        return (*grads, None)


def indexer_loss(q_index: Tensor, k_index: Tensor, w_index: Tensor, inputs: LossInputs) -> Tensor:
    """Scalar in fp32, or fp64 for fp64 `q_index`; everything validated and resolved."""
    with full_precision(q_index.device):
        return IndexerLoss.apply(q_index, k_index, w_index, inputs)


def _stream_visible(q_index: Tensor, k_index: Tensor, w_index: Tensor, inputs: LossInputs, sums: Sums) -> None:
    """Eq. 3: both distributions over everything kept."""
    wide = sums.loss.dtype
    visible, kept = inputs.visible, inputs.kept
    batch, keys, groups, _ = inputs.k.shape
    heads, shared = q_index.shape[2], inputs.q.shape[2] // groups
    # What no query sees may be uninitialised memory: 0 * NaN would reach the gradients.
    main_keys = inputs.k.to(wide).masked_fill(~visible.seen_keys(keys)[..., None, None], 0.0)
    index_keys = k_index.to(wide).masked_fill(~kept.seen_keys(keys)[..., None], 0.0)
    grad_q, grad_k, grad_w = sums.grads
    for block in visible.blocks(batch * (2 * shared + 2 * heads + 4) * wide.itemsize):
        if not (kept.host_end > kept.host_start)[:, block.rows].any():
            continue
        counted = (kept.end > kept.start)[:, block.rows]
        hidden = visible.hidden_within(block)
        target = None
        for group in range(groups):
            part = slice(group * shared, (group + 1) * shared)
            queries = _counted_only(inputs.q[:, block.rows, part], counted, wide) * inputs.attention_scale
            logits = torch.bmm(queries.flatten(1, 2), main_keys[:, block.columns, group].transpose(1, 2))
            logits = logits.view(*queries.shape[:3], block.width)
            _cap(logits, inputs.softcap)
            fill_hidden(logits, hidden, torch.finfo(wide).min)
            sink = None if inputs.sink_logits is None else inputs.sink_logits[part]
            summed = _attention(logits, sink).sum(dim=2)
            target = summed if target is None else target.add_(summed)
        assert target is not None
        left_out = kept.hidden_within(block)
        fill_hidden(target, left_out, 0.0)
        queries = _counted_only(q_index[:, block.rows], counted, wide)
        coefficient = _counted_only(w_index[:, block.rows], counted, wide) * inputs.index_scale
        columns = index_keys[:, block.columns]
        dots = torch.bmm(queries.flatten(1, 2), columns.transpose(1, 2)).relu_()
        dots = dots.view(*queries.shape[:3], block.width)
        scores = _weighted_sum(coefficient, dots)
        fill_hidden(scores, left_out, torch.finfo(wide).min)
        grad_scores = _add_divergence(target, scores, counted, sums)
        if sums.wanted:
            grad_w[:, block.rows] = _weighted_dots(grad_scores, dots) * inputs.index_scale
            passed = _relu_backward(grad_scores, dots).flatten(1, 2)
            grad_q[:, block.rows] = torch.bmm(passed, columns).view(queries.shape) * coefficient.unsqueeze(-1)
            grad_k[:, block.columns] += torch.bmm(
                passed.transpose(1, 2), (queries * coefficient.unsqueeze(-1)).flatten(1, 2)
            )


def _stream_selected(q_index: Tensor, k_index: Tensor, w_index: Tensor, inputs: LossInputs, sums: Sums) -> None:
    """Eq. 4: both distributions over the selected tokens that are kept."""
    assert inputs.indices is not None
    wide = sums.loss.dtype
    batch, tokens, selected = inputs.indices.shape
    _, _, groups, head_dim = inputs.k.shape
    if not inputs.k.shape[1]:
        return
    index_heads, index_dim = q_index.shape[2:]
    per_selected = groups * head_dim + index_dim + 2 * inputs.q.shape[2] + 3 * index_heads + 4
    size = rows_per_block(selected * per_selected * wide.itemsize, q_index.device)
    grad_q, grad_k, grad_w = sums.grads
    for b in range(batch):
        for row in range(0, tokens, size):
            place = (b, slice(row, min(row + size, tokens)))
            indices = inputs.indices[place]
            hidden = ~_inside(indices, inputs.visible, place)
            left_out = hidden | ~_inside(indices, inputs.kept, place)
            counted = ~left_out.all(dim=-1)
            keys = gather_tokens(inputs.k[b], indices, hidden, wide)
            logits = scores_per_group(_counted_only(inputs.q[place], counted, wide) * inputs.attention_scale, keys)
            _cap(logits, inputs.softcap)
            logits.masked_fill_(hidden.unsqueeze(1), torch.finfo(wide).min)
            target = _attention(logits, inputs.sink_logits).sum(dim=1).masked_fill_(left_out, 0.0)
            queries = _counted_only(q_index[place], counted, wide)
            coefficient = _counted_only(w_index[place], counted, wide) * inputs.index_scale
            columns = gather_tokens(k_index[b], indices, left_out, wide)
            dots = torch.bmm(queries, columns.transpose(1, 2)).relu_()
            scores = _weighted_sum(coefficient, dots).masked_fill_(left_out, torch.finfo(wide).min)
            grad_scores = _add_divergence(target, scores, counted, sums)
            if sums.wanted:
                grad_w[place] = _weighted_dots(grad_scores, dots) * inputs.index_scale
                passed = _relu_backward(grad_scores, dots)
                grad_q[place] = torch.bmm(passed, columns) * coefficient.unsqueeze(-1)
                spread = torch.bmm(passed.transpose(1, 2), queries * coefficient.unsqueeze(-1))
                scatter_tokens(grad_k[b], indices, spread)


def _add_divergence(target: Tensor, scores: Tensor, counted: Tensor, sums: Sums) -> Tensor:
    """Adds `KL(target / sum(target) || softmax(scores))` of the counted queries to the sums.

    Args:
        target: `[..., n, s]`, not normalised, zero where left out.
        scores: `[..., n, s]`, the lowest finite number where left out.
        counted: `[..., n]`.

    Returns:
        The gradient of the sum of divergences by the scores, `softmax(scores) - target`, `[..., n, s]`.
    """
    mass = target.sum(dim=-1, keepdim=True)
    # Hardly any mass leaves nothing to compare; NaN is not below anything and reaches the loss.
    little = mass < least_mass(mass.dtype)
    counted = counted & ~little.squeeze(-1)
    target = target / mass.masked_fill(little, 1.0)
    predicted = torch.log_softmax(scores, dim=-1)
    divergence = (torch.xlogy(target, target) - target * predicted).sum(dim=-1)
    sums.loss += divergence.masked_fill(~counted, 0.0).sum()
    sums.count += counted.sum()
    return predicted.exp_().sub_(target).masked_fill_(~counted.unsqueeze(-1), 0.0)


def _attention(logits: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Softmax over the last dim of `[..., heads, s]`; a sink takes its share of every head's mass."""
    weights = torch.softmax(logits, dim=-1)
    if sink_logits is not None:
        share = torch.sigmoid(torch.logsumexp(logits, dim=-1) - sink_logits.to(logits.dtype))
        weights.mul_(share.unsqueeze(-1))
    return weights


def _cap(logits: Tensor, softcap: float | None) -> None:
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)


def _counted_only(tensor: Tensor, counted: Tensor, wide: torch.dtype) -> Tensor:
    """A block of a query tensor in the dtype `wide`, zeroed for the queries that do not count."""
    mask = ~counted.view(*counted.shape, *(1 for _ in tensor.shape[counted.ndim :]))
    return tensor.to(wide).masked_fill(mask, 0.0)


def _inside(indices: Tensor, ranges: VisibleRanges, place: tuple[int, slice]) -> Tensor:
    """Mask of the indices `[n, K]` that lie in the queries' ranges; `-1` never does."""
    start, end = ranges.start[place].unsqueeze(-1), ranges.end[place].unsqueeze(-1)
    return (indices >= start) & (indices < end) & (indices >= 0)


def _weighted_sum(coefficient: Tensor, dots: Tensor) -> Tensor:
    """`sum_j coefficient[..., j] * dots[..., j, s]`."""
    return torch.matmul(coefficient.unsqueeze(-2), dots).squeeze(-2)


def _weighted_dots(grad_scores: Tensor, dots: Tensor) -> Tensor:
    """`sum_s grad_scores[..., s] * dots[..., j, s]`."""
    return torch.matmul(dots, grad_scores.unsqueeze(-1)).squeeze(-1)


def _relu_backward(grad_scores: Tensor, dots: Tensor) -> Tensor:
    """`grad_scores` for every index head whose dot product is positive, else zero: `[..., Hi, s]`."""
    return torch.ops.aten.threshold_backward(grad_scores.unsqueeze(-2).expand_as(dots), dots, 0.0)
