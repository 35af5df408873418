"""An observer that keeps what every layer selected: counts for the whole text, the exact selection for a few tokens.

While a prompt is read, each layer counts how often a token was selected by queries that had a choice: those that see
more than `K` tokens and have the token neither among the sinks nor in the local window. For the queries that write the
answer (and those of the question) the selection itself is kept, with the attention on every token of it.

Memory is `O(layers * n)` for the counts and `O(layers * kept queries * K)` for the selections.

Shapes: `B = 1` text, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D` head dim, `K` top-k.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsa.config import DSAConfig
from dsa.eval.window import sinks_and_recent
from dsa.models.context import AttentionCall

PARTS = 192
"""Parts of equal length into which the text is cut to say which part selected which."""

SAMPLED_EVERY = 8
"""Of every so many queries one says from how far it selected."""

ENTRIES_AT_MOST = 6_000_000
"""Selected tokens kept exactly, over all layers and kept queries: what keeps a report below 20 MB."""


@dataclass
class Row:
    """What one query read in one layer.

    Args:
        positions: int32, ascending: what it selected, or the most attended of that where not all is kept.
        weights: fp32, the attention on each, mean over heads; over all that was read they sum to one.
        read: How many tokens it read.
        kept: Share of the attention that reading everything would give which falls on what was read.
        window_kept: The same for sinks and a sliding window of the same budget.
        outside: Share of the attention, as it was, on tokens outside that window.
        selected_outside: How many of the tokens read are outside that window.
    """

    positions: Tensor
    weights: Tensor
    read: int
    kept: float
    window_kept: float
    outside: float
    selected_outside: int


@dataclass
class LayerCounts:
    """One layer's counts over the prompt's queries.

    Args:
        layer: Layer number.
        top_k: Tokens read per query; `None` in a layer that reads everything.
        local: Most recent tokens that are always read.
        selected: int32 `[n]`: by how many queries with a choice a token was selected.
        read: Tokens read, summed over queries.
        sampled: Queries whose attention was measured.
        kept: Sum over these of the share of dense attention that the selection holds.
        window_kept: The same for sinks and a window of the same budget.
    """

    layer: int
    top_k: int | None
    local: int
    selected: Tensor
    read: int = 0
    sampled: int = 0
    kept: float = 0.0
    window_kept: float = 0.0


@dataclass
class Recorder:
    """An observer for `DSAContext(observer=..., every_layer=True)`, over all passes of one text.

    Args:
        config: What the model is attached with.
        tokens: `n`, tokens of the prompt.
        exact_from: First query whose selections are kept.
        queries: How many are kept at most.
        layers: How many layers the model has.
        measure_every: Of every so many prompt queries the attention of one is measured.
    """

    config: DSAConfig
    tokens: int
    exact_from: int
    queries: int
    layers: int
    measure_every: int = 64
    counts: dict[int, LayerCounts] = field(default_factory=dict)
    rows: dict[int, dict[int, Row]] = field(default_factory=dict)
    seconds: float = 0.0
    """Spent here, to be taken off the times of the passes."""

    def __post_init__(self) -> None:
        self.distance_sum = torch.zeros(self.tokens, dtype=torch.float64)
        self.distance_count = torch.zeros(self.tokens, dtype=torch.float64)
        self.parts = torch.zeros(PARTS * PARTS, dtype=torch.float64)
        self.entries = max(16, ENTRIES_AT_MOST // (self.queries * self.layers))

    @torch.no_grad()
    def __call__(self, call: AttentionCall) -> None:
        began = time.perf_counter()
        counts = self.counts.get(call.layer)
        if counts is None:
            dense = self.config.is_dense(call.layer)
            top_k = None if dense else self.config.layer_top_k(call.layer)
            local = 0 if dense else self.config.layer_local(call.layer)
            counts = LayerCounts(call.layer, top_k, local, torch.zeros(self.tokens, dtype=torch.int32))
            self.counts[call.layer] = counts
        first = call.key.shape[1] - call.query.shape[1]
        if first < self.tokens:
            self._count(call, counts, first)
        for row in range(call.query.shape[1]):
            query = first + row
            exact = self.exact_from <= query < self.exact_from + self.queries
            sampled = query < self.tokens and query % self.measure_every == self.measure_every - 1
            if not exact and not sampled:
                continue
            measured = measure(call, row, counts.top_k, self.entries)
            if exact:
                self.rows.setdefault(query, {})[call.layer] = measured
            if sampled and counts.top_k is not None and query >= counts.top_k:
                counts.sampled += 1
                counts.kept += measured.kept
                counts.window_kept += measured.window_kept
        self.seconds += time.perf_counter() - began

    def _count(self, call: AttentionCall, counts: LayerCounts, first: int) -> None:
        """Counts one pass of the prompt; `first` is the position of its first query."""
        ends = call.key_end[0].cpu()
        if call.indices is None or counts.top_k is None:
            counts.read += int(ends.sum())
            return
        indices = call.indices[0].cpu()
        # A row of K or V belongs to one KV head: of several selections each reads its own part of a token.
        counts.read += int((indices >= 0).sum()) // (indices.shape[1] if indices.ndim == 3 else 1)
        chooses = ends > counts.top_k
        if not bool(chooses.any()):
            return
        indices, far_end = each_once(indices), (ends - counts.local)[:, None]
        far = (indices >= self.config.sinks) & (indices < far_end) & chooses[:, None]
        flat = torch.where(far, indices, self.tokens).flatten()
        counts.selected += torch.bincount(flat, minlength=self.tokens + 1)[: self.tokens].int()
        some = slice((-first) % SAMPLED_EVERY, None, SAMPLED_EVERY)
        chosen, is_far = indices[some], far[some]
        queries = (torch.arange(first, first + len(indices))[some, None]).expand_as(chosen)[is_far]
        keys = chosen[is_far].long()
        distances = (queries - keys).double().log2()
        self.distance_sum += torch.bincount(keys, weights=distances, minlength=self.tokens)
        self.distance_count += torch.bincount(keys, minlength=self.tokens)
        cell = queries * PARTS // self.tokens * PARTS + keys * PARTS // self.tokens
        self.parts += torch.bincount(cell, minlength=PARTS * PARTS)

    def rates(self, layer: int) -> Tensor:
        """fp32 `[n]`: share of the queries with a choice that selected each token; 0 where nobody had one."""
        counts = self.counts[layer]
        if counts.top_k is None:
            return torch.zeros(self.tokens)
        places = torch.arange(self.tokens)
        choosers = (self.tokens - torch.clamp(places + counts.local, min=counts.top_k)).clamp(min=0)
        rates = counts.selected / choosers.clamp(min=1)
        rates[: self.config.sinks] = 0
        return rates

    def distances(self) -> Tensor:
        """fp32 `[n]`: the mean of `log2(distance)` from which each token was selected; 0 where it never was."""
        return (self.distance_sum / self.distance_count.clamp(min=1)).float()


def each_once(indices: Tensor) -> Tensor:
    """What any of several selections `[T, Gs, K]` reads, `[T, Gs * K]` with each token once and -1 elsewhere.

    One selection `[T, K]` stays as it is.
    """
    if indices.ndim == 2:
        return indices
    ordered = indices.flatten(1).sort(dim=1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(again, -1)


def measure(call: AttentionCall, row: int, top_k: int | None, entries: int) -> Row:
    """What one query of a call read, and what its attention would be on everything.

    Of several selections: the tokens that any of them read, with their attention, a mean over all heads; 0 from the
    heads that did not read them. Shares are means over the selections, `read` and `selected_outside` too, in whole
    tokens.

    Args:
        call: The layer's attention.
        row: The query.
        top_k: `K`; `None` in a layer that reads everything.
        entries: Tokens to keep at most.
    """
    selections = 1 if call.indices is None or call.indices.ndim == 3 else call.indices.shape[2]
    if selections == 1:
        return _measure(call, row, top_k, entries)
    found = [_measure(part, row, top_k, call.key.shape[1]) for part in call.by_selection(selections)]
    weights = torch.zeros(call.key.shape[1])
    for each in found:
        weights[each.positions.long()] += each.weights / selections
    positions = each_once(torch.cat([each.positions for each in found])[None, None])[0]
    positions = positions[positions >= 0].long()
    if len(positions) > entries:
        positions = positions[weights[positions].topk(entries, sorted=False).indices].sort().values
    means = (
        sum(getattr(each, name) for each in found) / selections
        for name in ("read", "kept", "window_kept", "outside", "selected_outside")
    )
    read, kept, window_kept, outside, selected_outside = means
    return Row(positions.int(), weights[positions], round(read), kept, window_kept, outside, round(selected_outside))


def _measure(call: AttentionCall, row: int, top_k: int | None, entries: int) -> Row:
    """`measure` for one selection and the heads that read it.

    Sink logits, where a model has them, belong to no token and are left out: shares are of what goes to tokens.
    """
    start, end = int(call.key_start[0, row]), int(call.key_end[0, row])
    scores = _scores(call, row, start, end)
    everything = scores.softmax(dim=-1).mean(dim=0)
    if call.indices is None:
        positions = torch.arange(start, end, device=scores.device)
    else:
        positions = call.indices[0, row].long()
        positions = positions[positions >= 0]
    weights = scores[:, positions - start].softmax(dim=-1).mean(dim=0)
    kept = float(everything[positions - start].sum())
    window_kept, outside, selected_outside = 1.0, 0.0, 0
    if top_k is not None and end - start > top_k:
        sinks, recent = sinks_and_recent(top_k)
        window_kept = float(everything[:sinks].sum() + everything[len(everything) - recent :].sum())
        beyond = (positions >= start + sinks) & (positions < end - recent)
        outside, selected_outside = float(weights[beyond].sum()), int(beyond.sum())
    read = len(positions)
    if read > entries:
        best = weights.topk(entries, sorted=False).indices.sort().values
        positions, weights = positions[best], weights[best]
    return Row(positions.int().cpu(), weights.cpu(), read, kept, window_kept, outside, selected_outside)


def _scores(call: AttentionCall, row: int, start: int, end: int) -> Tensor:
    """fp32 `[H, end - start]`, without copying the keys."""
    groups = call.key.shape[2]
    query = call.query[0, row].float() * call.scale
    per_group = query.unflatten(0, (groups, -1))
    scores = torch.cat([per_group[g] @ call.key[0, start:end, g].float().T for g in range(groups)])
    return scores if call.softcap is None else call.softcap * torch.tanh(scores / call.softcap)
