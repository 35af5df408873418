"""From scores of blocks of queries to the selection, in plain torch: shared by the implementations that select with it.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Gs` selections of a query, `K` top-k; `n` query tokens and `s` key
columns of one block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsa.ops.ranges import Block, VisibleRanges


def crowded_rows(ranges: VisibleRanges, top_k: int) -> Tensor:
    """Query tokens, on the CPU, for which some query of the batch sees more than `K`; all others need no scores."""
    return ((ranges.host_end - ranges.host_start) > top_k).any(dim=0).nonzero().squeeze(-1)


def select_by_blocks(
    ranges: VisibleRanges,
    top_k: int,
    sinks: int,
    local: int,
    score: Callable[[Block], Tensor],
    bytes_per_pair: int,
    selections: int | None = None,
) -> Tensor:
    """int32 `[B, T, K]`: the sinks, the local window and the highest scores of each query.

    Args:
        score: Scores `[B, n, s]` of a block, whose rows count the tokens of `crowded_rows`.
        bytes_per_pair: What a block needs for each of its query tokens times each of its columns.
        selections: `Gs`, where scores are `[B, n, Gs, s]` and the result `[B, T, Gs, K]`.
    """
    selection = _everything_visible(ranges, top_k)
    if selections is not None:
        selection = selection.unsqueeze(2).repeat(1, 1, selections, 1)
    crowded = crowded_rows(ranges, top_k)
    if not crowded.numel():
        return selection
    rows = crowded.to(selection.device)
    ranges = ranges.select(crowded)
    optional = ranges.shrink(sinks, local)
    for block in ranges.blocks(bytes_per_pair):
        scores = score(block)
        keys = ordered_keys(scores)
        _force_edges(keys, ranges, optional, block, torch.iinfo(keys.dtype))
        columns = select_highest(keys, top_k) + block.columns.start
        targets = rows[block.rows]
        is_crowded = (ranges.end - ranges.start)[:, block.rows] > top_k
        is_crowded = is_crowded.view(*is_crowded.shape, *(1 for _ in columns.shape[2:]))
        selection[:, targets] = torch.where(is_crowded, columns.int(), selection[:, targets])
    return selection


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
        for seen, key in ((optional, limits.max), (visible, limits.min)):
            hidden = ~seen.visible(block, left, right)
            edge.masked_fill_(hidden if edge.ndim == 3 else hidden.unsqueeze(2), key)
