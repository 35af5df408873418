"""Share of the dense model's attention that a selection keeps, measured on the dense model's own activations.

For every query past `start`, the attention probabilities of all heads are computed once, a block of queries at a
time, and three selections of the same size are read off them: the indexer's, "4 sinks + sliding window", and the
oracle (the tokens with the most attention, summed over heads). Where each query makes several selections, each is
measured on the heads that read it, next to the oracle of these heads, and the figures are means over the selections.

Shapes: `B = 1` text, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `K` tokens read per query.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dsa.config import DSAConfig
from dsa.eval.window import sinks_and_recent
from dsa.models.context import AttentionCall
from dsa.ops import index_topk

PROBABILITIES_AT_ONCE = 1 << 20
"""Attention probabilities held at once, `H * queries * S`: 4 MB in fp32, which stays in cache."""


@dataclass(frozen=True)
class LayerMass:
    """One layer's figures, means over the measured queries (and heads, for the masses).

    Args:
        layer: Layer number.
        dsa: Share of the attention mass on the indexer's selection.
        window: The same for sinks and window.
        oracle: The same for the best selection of that size.
        tokens_mean: Tokens that the indexer's selection reads per query.
        tokens_max: The most that any query reads.
        recall: Share of the oracle's selection that is in the indexer's.
    """

    layer: int
    dsa: float
    window: float
    oracle: float
    tokens_mean: float
    tokens_max: int
    recall: float


@dataclass
class MassObserver:
    """An observer for a pass with `mode="dense"`; afterwards `layers` holds a row per layer that selects.

    Args:
        config: What the model is attached with.
        start: First query that counts.
        layers: Filled while the model runs.
    """

    config: DSAConfig
    start: int
    layers: list[LayerMass] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, call: AttentionCall) -> None:
        self.layers.append(measure_layer(call, self.config, self.start))

    def mean(self, name: str) -> float | None:
        """Mean of one figure over the layers; `None` where no layer was measured."""
        return sum(getattr(row, name) for row in self.layers) / len(self.layers) if self.layers else None


def measure_layer(call: AttentionCall, config: DSAConfig, start: int) -> LayerMass:
    """The figures of one layer, over its queries from `start` on."""
    selections = config.layer_selections(call.layer, call.key.shape[2])
    rows = [_measure(part, config, start) for part in call.by_selection(selections)]
    names = ("dsa", "window", "oracle", "tokens_mean", "recall")
    means = {name: sum(getattr(row, name) for row in rows) / len(rows) for name in names}
    return LayerMass(call.layer, tokens_max=max(row.tokens_max for row in rows), **means)


def _measure(call: AttentionCall, config: DSAConfig, start: int) -> LayerMass:
    """The figures of one selection and the heads that read it.

    The selection is what the layer would read with these activations: `index_topk` on the stored index keys
    with the layer's own budget.
    """
    assert call.index_query is not None
    assert call.index_key is not None
    assert call.index_weight is not None
    top_k = config.layer_top_k(call.layer)
    key_start, key_end = call.key_start[:, start:], call.key_end[:, start:]
    indices = index_topk(
        call.index_query[:, start:],
        call.index_key,
        call.index_weight[:, start:],
        top_k,
        sinks=config.sinks,
        local=config.layer_local(call.layer),
        key_start=key_start,
        key_end=key_end,
    )
    heads, keys = call.query.shape[2], call.key.shape[1]
    rows = max(1, PROBABILITIES_AT_ONCE // (heads * keys))
    query, key = call.query[:, start:].transpose(1, 2), call.key.transpose(1, 2)
    queries = query.shape[2]
    kept = torch.zeros(5, dtype=torch.float64)
    for begin in range(0, queries, rows):
        block = slice(begin, min(begin + rows, queries))
        first, stop = key_start[:, block], key_end[:, block]
        seen = int(stop.max())
        mass = mean_probabilities(query[:, :, block], key[:, :, :seen], call, first, stop)
        chosen = indices[:, block]
        on_chosen = mass.gather(2, chosen.clamp(min=0).long()).masked_fill(chosen < 0, 0.0)
        best = mass.topk(min(top_k, seen), dim=2, sorted=False)
        # Tokens that a query cannot see have no mass and are nobody's to find.
        wanted = best.values > 0
        is_chosen = torch.zeros_like(mass).scatter_add_(2, chosen.clamp(min=0).long(), (chosen >= 0).to(mass.dtype))
        found = is_chosen.gather(2, best.indices) * wanted
        sums = (on_chosen, mass * _in_window(first, stop, seen, top_k), best.values, found, wanted)
        kept += torch.stack([each.sum(dtype=torch.float64) for each in sums]).cpu()
    dsa, window, oracle = (kept[:3] / (query.shape[0] * queries)).tolist()
    read = (indices >= 0).sum(dim=2)
    recall = float(kept[3] / kept[4])
    return LayerMass(call.layer, dsa, window, oracle, float(read.double().mean()), int(read.max()), recall)


def mean_probabilities(
    query: torch.Tensor, key: torch.Tensor, call: AttentionCall, first: torch.Tensor, stop: torch.Tensor
) -> torch.Tensor:
    """Attention probabilities over the visible keys, mean over heads.

    Sink logits, where a model has them, take part of every row's mass but belong to no token, so they are left
    out: shares are of what goes to tokens.

    Args:
        query: `[B, H, T, D]`.
        key: `[B, G, S, D]`.
        call: Gives scale and softcap.
        first: First visible key per query, `[B, T]`.
        stop: One past the last, `[B, T]`.

    Returns:
        fp32 `[B, T, S]`, rows summing to one.
    """
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    grouped = (query.float() * call.scale).reshape(batch, groups, heads // groups * rows, width)
    scores = (grouped @ key.float().transpose(2, 3)).view(batch, heads, rows, -1)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    positions = torch.arange(key.shape[2], device=key.device)
    hidden = (positions < first[..., None]) | (positions >= stop[..., None])
    return scores.masked_fill_(hidden[:, None], float("-inf")).softmax(dim=-1).mean(dim=1)


def _in_window(first: torch.Tensor, stop: torch.Tensor, keys: int, top_k: int) -> torch.Tensor:
    """Which keys a query's sinks and window hold, bool `[B, T, S]`."""
    sinks, recent = sinks_and_recent(top_k)
    positions = torch.arange(keys, device=first.device)
    return (positions < first[..., None] + sinks) | (positions >= stop[..., None] - recent)
