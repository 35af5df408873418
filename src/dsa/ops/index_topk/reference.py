"""Lightning indexer and top-k selection in plain torch: the specification of `index_topk`.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `K` top-k;
`n` query tokens and `s` key columns of one block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsa.ops.quantize.reference import KEY_LEVELS, QUERY_LEVELS, quantize_queries_int8, rotate
from dsa.ops.quantize.types import QuantizedKeys
from dsa.ops.ranges import Block, VisibleRanges


class ScoreInputs(NamedTuple):
    """`score[t, s] = (sum over j in order of coefficient[t, j] * relu(query[t, j] . key[s])) * key_scale[s]`.

    Args:
        query: `[B, T, Hi, Di]`, in the dtype of the dot products.
        key: `[B, S, Di]`, in the dtype of the dot products.
        coefficient: `[B, T, Hi]`, in the dtype of the scores.
        key_scale: `[B, S]` in the dtype of the scores, or `None` for 1.
    """

    query: Tensor
    key: Tensor
    coefficient: Tensor
    key_scale: Tensor | None


def prepare_scores(q: Tensor, k: Tensor | QuantizedKeys, w: Tensor, scale: float) -> ScoreInputs:
    """Brings queries, keys and weights into the form in which they are scored.

    The dot products must not depend on how a matrix product is split into tiles, or the selection would
    change with chunking and padding. Integers are exact. Everything else is multiplied in fp64 and rounded
    to fp32 once, which hides the order of summation.
    """
    if isinstance(k, Tensor):
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        coefficient = w.to(wide) * scale
        return ScoreInputs(q.double(), k.double(), coefficient, None)
    if k.dtype == "fp8":
        # Through fp32, which holds every e4m3 number: not every device converts it to fp64.
        return ScoreInputs(rotate(q).double(), k.data.float().double(), w.float() * scale, k.scale)
    data, query_scale = quantize_queries_int8(q)
    largest = KEY_LEVELS * QUERY_LEVELS * q.shape[-1]
    exact = torch.float32 if largest < 1 << 24 else torch.float64
    return ScoreInputs(data.to(exact), k.data.to(exact), (w.float() * query_scale) * scale, k.scale)


def score_block(inputs: ScoreInputs, block: Block) -> Tensor:
    """Scores `[B, n, s]` of one block: products and sums are rounded one by one, head after head."""
    query = inputs.query[block.batch, block.rows].transpose(1, 2)
    batch, heads, rows, head_dim = query.shape
    key = inputs.key[block.batch, block.columns]
    coefficient = inputs.coefficient[block.batch, block.rows]
    dots = torch.matmul(query.reshape(batch, heads * rows, head_dim), key.transpose(1, 2))
    dots = dots.view(batch, heads, rows, block.width)
    scores = None
    for head in range(heads):
        term = dots[:, head].to(coefficient.dtype).relu_().mul_(coefficient[:, :, head, None])
        scores = term if scores is None else scores.add_(term)
    assert scores is not None
    if inputs.key_scale is not None:
        scores.mul_(inputs.key_scale[block.batch, None, block.columns])
    return scores


def ordered_keys(scores: Tensor) -> Tensor:
    """Integers in the order of the scores: `-0.0` equals `0.0`, NaN comes below every number.

    The lowest and the highest integer are left free for tokens that cannot and that must be selected.
    """
    integer = torch.int64 if scores.dtype == torch.float64 else torch.int32
    limits = torch.iinfo(integer)
    bits = (scores + 0.0).view(integer)
    keys = (bits >> (limits.bits - 1)).bitwise_and_(limits.max).bitwise_xor_(bits)
    return keys.masked_fill_(scores.isnan(), limits.min + 1)


def select_highest(keys: Tensor, top_k: int) -> Tensor:
    """Columns `[..., K]`, ascending, of the `K` highest keys of each row; the last of equals win.

    Args:
        keys: `[..., s]` with `s >= K`.
    """
    width = keys.shape[-1]
    rows = keys.reshape(-1, width)
    # Only the value of the K-th is used: the order in which topk returns equals is not defined.
    threshold = rows.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    chosen = rows >= threshold
    crowded = (chosen.sum(dim=-1) > top_k).nonzero().squeeze(-1)
    if crowded.numel():
        above = rows[crowded] > threshold[crowded]
        equal = chosen[crowded] & ~above
        room = top_k - above.sum(dim=-1, keepdim=True)
        from_the_right = equal.flip(-1).cumsum(dim=-1, dtype=torch.int32).flip(-1)
        chosen[crowded] = above | (equal & (from_the_right <= room))
    return chosen.view(-1).nonzero().remainder_(max(1, width)).view(*keys.shape[:-1], top_k)


def index_topk(
    q: Tensor,
    k: Tensor | QuantizedKeys,
    w: Tensor,
    top_k: int,
    *,
    scale: float,
    sinks: int,
    local: int,
    ranges: VisibleRanges,
) -> Tensor:
    """int32 `[B, T, K]`; arguments as in `api.index_topk`, validated and resolved."""
    selection = _everything_visible(ranges, top_k)
    counts = ranges.host_end - ranges.host_start
    # Tokens for which some query of the batch sees more than it may select; all others skip the scores.
    crowded = (counts > top_k).any(dim=0).nonzero().squeeze(-1)
    if not crowded.numel():
        return selection
    rows = crowded.to(q.device)
    inputs = prepare_scores(q[:, rows], k, w[:, rows], scale)
    ranges = ranges.select(crowded)
    optional = ranges.shrink(sinks, local)
    batch, _, heads, _ = inputs.query.shape
    bytes_per_pair = batch * (heads * inputs.query.element_size() + 12)
    limits = torch.iinfo(torch.int64 if inputs.coefficient.dtype == torch.float64 else torch.int32)
    for block in ranges.blocks(bytes_per_pair):
        keys = ordered_keys(score_block(inputs, block))
        _force_edges(keys, ranges, optional, block, limits)
        columns = select_highest(keys, top_k) + block.columns.start
        targets = rows[block.rows]
        is_crowded = (ranges.end - ranges.start)[:, block.rows, None] > top_k
        selection[:, targets] = torch.where(is_crowded, columns.int(), selection[:, targets])
    return selection


def _everything_visible(ranges: VisibleRanges, top_k: int) -> Tensor:
    """The first `K` visible positions of each query: all of them where there are no more."""
    positions = ranges.start.unsqueeze(-1) + torch.arange(top_k, device=ranges.start.device)
    return positions.masked_fill_(positions >= ranges.end.unsqueeze(-1), -1).int()


def _force_edges(
    keys: Tensor, visible: VisibleRanges, optional: VisibleRanges, block: Block, limits: torch.iinfo
) -> None:
    """Gives sinks and local tokens the highest key, hidden tokens the lowest."""
    first = block.columns.start
    for left, right in optional.edges_within(block):
        edge = keys[..., left - first : right - first]
        edge.masked_fill_(~optional.visible(block, left, right), limits.max)
        edge.masked_fill_(~visible.visible(block, left, right), limits.min)
