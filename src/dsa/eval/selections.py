"""Selections to hold against the indexer's: the oracle, sinks and window, a fixed pattern, blocks as in Quest, random.

Each is a function of an `AttentionCall` for `DSAContext.select` and chooses for every layer that is sparse, with that
layer's own budget; layers that the configuration leaves dense are never asked. Layers that share another's indices
choose for themselves here.

All return what `index_topk` does: int32 `[B, T, K]`, positions among the keys, ascending, inside each query's visible
range, padded at the end with -1. Queries that see at most `K` tokens read all of them. In layers that read by several
selections the oracle is one for each, `[B, T, Gs, K]`; the others are for all heads.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D` head dim, `K` tokens read per query;
`n` queries of one chunk, `N` blocks of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dsa.config import DSAConfig
from dsa.eval.mass import PROBABILITIES_AT_ONCE, mean_probabilities
from dsa.eval.window import SINKS, sinks_and_recent
from dsa.models.context import AttentionCall

Selection = Callable[[AttentionCall], Tensor]

SELECTIONS = ("window", "pattern", "blocks", "oracle", "random")

BLOCK = 32
"""Tokens a block."""

VALUES_AT_ONCE = 1 << 20
"""Numbers of one chunk of queries held at once, 4 MB in fp32."""


def selection(name: str, config: DSAConfig, seed: int = 0) -> Selection:
    """What to give to `DSAContext(select=...)`.

    Args:
        name: One of `SELECTIONS`.
        config: What the model is attached with: it has each layer's budget.
        seed: Of the random selection, which goes on from call to call.

    Raises:
        ValueError: No such selection.
    """
    if name not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {name!r}")
    if name == "random":
        generators: dict[torch.device, torch.Generator] = {}

        def randomly(call: AttentionCall) -> Tensor:
            device = call.query.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(seed)
            return random(call, config.layer_top_k(call.layer), generators[device])

        return randomly
    if name == "oracle":

        def best(call: AttentionCall) -> Tensor:
            parts = call.by_selection(selections_of(call, config))
            found = [oracle(part, config.layer_top_k(call.layer)) for part in parts]
            return found[0] if len(found) == 1 else torch.stack(found, dim=2)

        return best
    function = {"window": window, "pattern": pattern, "blocks": blocks}[name]
    return lambda call: function(call, config.layer_top_k(call.layer))


def selections_of(call: AttentionCall, config: DSAConfig) -> int:
    """How many selections the layer reads by: 1 where the call is for the heads of one already."""
    if call.index_weight is not None:
        return call.index_weight.shape[2] if call.index_weight.ndim == 4 else 1
    return config.layer_selections(call.layer, call.key.shape[2])


def window(call: AttentionCall, top_k: int) -> Tensor:
    """The first 4 visible tokens and the most recent ones, `top_k` in all."""
    sinks, _ = sinks_and_recent(top_k)
    start, end = call.key_start[..., None], call.key_end[..., None]
    columns = torch.arange(min(top_k, call.key.shape[1]), dtype=torch.int32, device=start.device)
    positions = torch.where(columns < sinks, start + columns, torch.maximum(start, end - top_k) + columns)
    return positions.masked_fill_(positions >= end, -1).int()


@torch.no_grad()
def oracle(call: AttentionCall, top_k: int) -> Tensor:
    """The tokens with the most attention, summed over heads."""
    heads, keys = call.query.shape[2], call.key.shape[1]
    query, key = call.query.transpose(1, 2), call.key.transpose(1, 2)
    chosen = _empty(call, top_k)
    for rows in _chunks(call, PROBABILITIES_AT_ONCE // (heads * keys)):
        first, stop = call.key_start[:, rows], call.key_end[:, rows]
        seen = max(1, int(stop.max()))
        mass = mean_probabilities(query[:, :, rows], key[:, :, :seen], call, first, stop)
        _keep_best(mass, first, stop, top_k, chosen[:, rows])
    return chosen


@torch.no_grad()
def pattern(call: AttentionCall, top_k: int) -> Tensor:
    """A window and global tokens at fixed distances, as in Longformer (arXiv 2004.05150).

    Every m-th visible token is read, the first 4, and the most recent others. `m` is the least power of two at which
    the global tokens take at most half of the budget that the first 4 leave, so it doubles as the text grows and the
    global tokens are always among those of before: no choice depends on what the tokens are, or on how a text is cut
    into chunks.
    """
    keys = call.key.shape[1]
    sinks = sinks_and_recent(top_k)[0]
    most = (top_k - sinks) // 2
    chosen = _empty(call, top_k)
    for rows in _chunks(call, VALUES_AT_ONCE // keys):
        first, stop = call.key_start[:, rows], call.key_end[:, rows]
        seen = max(1, int(stop.max()))
        positions = torch.arange(seen, device=first.device)
        age = positions - first[..., None]
        # The most recent first; positions are exact in fp32 as far as 2^24.
        rank = positions.float().expand(*first.shape, -1).clone()
        rank.masked_fill_(age < sinks, 2.0 * seen)
        if most > 0:
            needed = ((stop - first).clamp_min(1)[..., None] + most - 1) // most
            stride = torch.pow(2, needed.double().log2().ceil()).long()
            rank.masked_fill_(age % stride == 0, 2.0 * seen)
        _keep_best(rank, first, stop, top_k, chosen[:, rows])
    return chosen


@torch.no_grad()
def random(call: AttentionCall, top_k: int, generator: torch.Generator) -> Tensor:
    """The first 4 visible tokens, the last one, and others at random."""
    keys = call.key.shape[1]
    chosen = _empty(call, top_k)
    for rows in _chunks(call, VALUES_AT_ONCE // keys):
        first, stop = call.key_start[:, rows], call.key_end[:, rows]
        seen = max(1, int(stop.max()))
        drawn = torch.rand((*first.shape, seen), generator=generator, device=first.device)
        positions = torch.arange(seen, device=first.device)
        drawn.masked_fill_(positions < first[..., None] + sinks_and_recent(top_k)[0], 2.0)
        drawn.masked_fill_(positions == stop[..., None] - 1, 3.0)
        _keep_best(drawn, first, stop, top_k, chosen[:, rows])
    return chosen


@torch.no_grad()
def blocks(call: AttentionCall, top_k: int, block: int = BLOCK) -> Tensor:
    """Whole blocks of keys, chosen by what a query could find in them at most (Quest, arXiv 2406.10774).

    A block keeps the smallest and the largest value of its keys in every dim. No key in it can have a larger product
    with a query than `sum_d max(q_d * smallest_d, q_d * largest_d)`. Blocks rank by the softmax of these bounds over
    all blocks that a query sees whole, summed over heads.

    Quest lets every head read blocks of its own. Here the heads share one set, as DSA's do: the budget is tokens read
    per query, and the cache is read once for all heads of a group.

    The block of the query itself and the blocks of the first 4 tokens are always read. The budget is used up: the last
    block that is taken, and any that the query sees in part, are read from their end as far as the budget goes.

    Args:
        call: The layer's attention.
        top_k: `K`, at least two blocks to make sense.
        block: Tokens a block.
    """
    largest, smallest = _bounds(call.key, block)
    # sum_d max(q * smallest, q * largest) is one product: the query's positive part with the largest values, its
    # negative part with the smallest.
    bounds = torch.cat((largest, smallest), dim=-1).permute(0, 2, 3, 1)
    chosen = _empty(call, top_k)
    for rows in _chunks(call, VALUES_AT_ONCE // max(largest.shape[1] * call.query.shape[2], chosen.shape[2])):
        first, stop = call.key_start[:, rows, None], call.key_end[:, rows, None]
        begins = torch.arange(0, max(1, int(stop.max())), block, dtype=torch.int32, device=stop.device)
        whole = (begins >= first) & (begins + block <= stop)
        rank = _block_attention(call, rows, bounds[..., : len(begins)], whole)
        rank.masked_fill_((begins < first + SINKS) & (begins + block > first), 2.0)
        rank.masked_fill_((begins < stop) & (begins + block >= stop), 3.0)
        ends = torch.minimum(begins + block, stop)
        visible = (ends - torch.maximum(begins, first)).clamp_min_(0)
        order = rank.masked_fill_(visible == 0, -1.0).sort(dim=-1, descending=True, stable=True).indices
        ranked = visible.gather(-1, order)
        before = ranked.cumsum(dim=-1, dtype=torch.int32) - ranked
        read = torch.zeros_like(visible).scatter_(-1, order, torch.minimum(ranked, (top_k - before).clamp_min_(0)))
        chosen[:, rows] = _positions(ends, read, chosen.shape[2])
    return chosen


def _bounds(key: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Largest and smallest key of every block, `[B, N, G, D]`. An unfinished one is cut off, then padded with zeros.

    Its bounds are never used: no query sees it whole.
    """
    keys = key.shape[1]
    finished = key[:, : keys // block * block].float().unflatten(1, (-1, block))
    padding = (0, 0, 0, 0, 0, -(-keys // block) - finished.shape[1])
    return tuple(torch.nn.functional.pad(each, padding) for each in (finished.amax(dim=2), finished.amin(dim=2)))  # type: ignore[return-value]


def _block_attention(call: AttentionCall, rows: slice, bounds: Tensor, whole: Tensor) -> Tensor:
    """Softmax of the bounds over the blocks that are `whole` `[B, n, N]`, mean over heads; zero for the others."""
    query = call.query[:, rows].transpose(1, 2).float() * call.scale
    batch, heads, tokens, _ = query.shape
    groups = bounds.shape[1]
    parts = torch.cat((query.clamp_min(0), query.clamp_max(0)), dim=-1)
    scores = (parts.reshape(batch, groups, heads // groups * tokens, -1) @ bounds).view(batch, heads, tokens, -1)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill_(~whole[:, None], lowest).softmax(dim=-1).mean(dim=1).masked_fill_(~whole, 0.0)


def _positions(ends: Tensor, read: Tensor, width: int) -> Tensor:
    """The last `read` tokens before `ends` of every block, both int32 `[B, n, N]`, as indices `[B, n, width]`."""
    total = read.cumsum(dim=-1, dtype=torch.int32)
    columns = torch.arange(width, dtype=torch.int32, device=read.device).expand(*read.shape[:2], -1).contiguous()
    place = torch.searchsorted(total, columns, right=True, out_int32=True).clamp_max_(read.shape[-1] - 1)
    positions = (ends - total).gather(-1, place.long()) + columns
    return positions.masked_fill_(columns >= total[..., -1:], -1)


def _keep_best(values: Tensor, first: Tensor, stop: Tensor, top_k: int, out: Tensor) -> None:
    """Writes the positions of the largest `values` `[B, n, seen]`, none negative, that are visible."""
    seen = values.shape[2]
    positions = torch.arange(seen, device=values.device)
    values.masked_fill_((positions < first[..., None]) | (positions >= stop[..., None]), -1.0)
    best = values.topk(min(top_k, seen), dim=2, sorted=False)
    found = best.indices.masked_fill_(best.values < 0, seen).int().sort(dim=2).values
    out[..., : found.shape[2]] = found.masked_fill_(found == seen, -1)


def _empty(call: AttentionCall, top_k: int) -> Tensor:
    batch, tokens = call.query.shape[:2]
    width = min(top_k, call.key.shape[1])
    return torch.full((batch, tokens, width), -1, dtype=torch.int32, device=call.query.device)


def _chunks(call: AttentionCall, rows: int) -> Iterator[slice]:
    """The queries, `rows` at a time."""
    batch, tokens = call.query.shape[:2]
    rows = max(1, rows // batch)
    return (slice(begin, min(begin + rows, tokens)) for begin in range(0, tokens, rows))
