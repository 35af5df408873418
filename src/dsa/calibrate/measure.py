"""What each layer's selection would keep of its attention, at several budgets, and what an earlier layer's would.

One pass of the dense model: at each layer a sample of its queries is looked at. Selections at different budgets are
nested (sinks and local window, then tokens by score), so a ranking of the largest one gives all of them, and a layer's
attention is read once per ranking.

Shapes: `Q` sampled queries, `S` key tokens, `K` tokens read, `N` budgets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from dsa.config import DSAConfig
from dsa.cost import AttentionShape
from dsa.eval.mass import PROBABILITIES_AT_ONCE, mean_probabilities
from dsa.models.context import AttentionCall
from dsa.ops import index_topk

QUERIES = 512
ATTENTION_AT_ONCE = 1 << 25
"""Attention probabilities of one layer held at once, `Q * S`: 128 MB."""

NOT_SELECTED = 255


@dataclass
class Curves:
    """Means over the sampled queries of all texts.

    Args:
        layers: Layers with an indexer, ascending; rows and columns of the tables follow them.
        budgets: The `N` values of `K`, ascending.
        kept: `[layers, layers, N]`: share of the attention (mean over heads) that the first keeps when it reads what
            the second selects. Only earlier layers and the layer itself have values.
        harm: The same table of the mean of `(1 - kept)^HARM_POWER` over queries: few queries that lose much hurt
            more than many that lose a little.
        oracle: `[layers, N]`: the share on the best `K` tokens.
        queries: How many queries the means are over.
        shape: Sizes of the layers.
    """

    layers: list[int]
    budgets: list[int]
    kept: torch.Tensor
    harm: torch.Tensor
    oracle: torch.Tensor
    queries: int = 0
    shape: AttentionShape | None = None

    @classmethod
    def empty(cls, layers: list[int], budgets: list[int]) -> Curves:
        """Nothing measured yet."""
        size, count = len(layers), len(budgets)
        table = torch.full((size, size, count), torch.nan, dtype=torch.float64)
        return cls(layers, budgets, table, table.clone(), torch.zeros(size, count, dtype=torch.float64))

    def own(self, layer: int) -> torch.Tensor:
        """What a layer's own selection keeps, `[N]`."""
        row = self.layers.index(layer)
        return self.kept[row, row]


HARM_POWER = 2


def sampled_positions(start: int, tokens: int) -> torch.Tensor:
    """Evenly spaced queries from `start` on, the last one among them; int64 `[Q]`."""
    count = max(1, min(QUERIES, ATTENTION_AT_ONCE // tokens, tokens - start))
    return torch.linspace(start, tokens - 1, count, dtype=torch.float64).round().long()


@dataclass
class SelectionObserver:
    """An observer for a pass with `mode="dense"` over one text; adds what it sees to `curves`.

    Args:
        curves: The means so far.
        config: What the model is attached with.
        positions: Queries to look at, ascending.
        share: Whether to measure earlier layers' selections too.
        ranked: Token positions by rank, int32 `[Q, largest K]`, of the layers seen so far.
    """

    curves: Curves
    config: DSAConfig
    positions: torch.Tensor
    share: bool = True
    ranked: dict[int, torch.Tensor] = field(default_factory=dict)
    _weight: float = field(init=False)

    def __post_init__(self) -> None:
        self._weight = len(self.positions) / (self.curves.queries + len(self.positions))

    def finish(self) -> None:
        """Counts the text's queries, once the pass is over."""
        self.curves.queries += len(self.positions)
        self.ranked.clear()

    @torch.no_grad()
    def __call__(self, call: AttentionCall) -> None:
        curves, layer = self.curves, self.curves.layers.index(call.layer)
        if curves.shape is None:
            curves.shape = shape_of(call, self.config)
        rows = self.positions.to(call.query.device)
        own = rank(call, self.config, rows, curves.budgets)
        if not self.share:
            self.ranked.clear()
        self.ranked[layer] = own
        mass = attention_of(call, rows)
        self._add(curves.oracle, (layer,), _best(mass, curves.budgets).mean(dim=0))
        for source, ranking in self.ranked.items():
            kept = share_kept(mass, ranking, curves.budgets)
            self._add(curves.kept, (layer, source), kept.mean(dim=0))
            self._add(curves.harm, (layer, source), (1 - kept).clamp_min(0).pow(HARM_POWER).mean(dim=0))

    def _add(self, table: torch.Tensor, place: tuple[int, ...], value: torch.Tensor) -> None:
        before = table[place].nan_to_num()
        table[place] = before + (value.cpu() - before) * self._weight


def shape_of(call: AttentionCall, config: DSAConfig) -> AttentionShape:
    """Sizes of a layer, from the tensors it computes."""
    return AttentionShape(
        heads=call.query.shape[2],
        kv_heads=call.key.shape[2],
        key_dim=call.key.shape[3],
        value_dim=call.value.shape[3],
        index_heads=config.index_heads,
        index_head_dim=config.index_head_dim,
        kv_bytes=call.key.element_size(),
        index_bytes=4 if config.index_dtype == "fp32" else 1,
    )


def rank(call: AttentionCall, config: DSAConfig, rows: torch.Tensor, budgets: list[int]) -> torch.Tensor:
    """Token positions int32 `[Q, largest K]`, such that the first `K` columns are the selection of that budget.

    Within a budget's step they are ascending; -1 pads, at the end, the rows of queries that see fewer tokens.
    """
    assert call.index_query is not None
    assert call.index_key is not None
    assert call.index_weight is not None
    keys = call.key.shape[1]
    # One column more takes what -1 points at.
    step = torch.full((len(rows), keys + 1), NOT_SELECTED, dtype=torch.uint8, device=rows.device)
    selected = torch.empty(0)
    for number in reversed(range(len(budgets))):
        chosen = index_topk(
            call.index_query[:, rows],
            call.index_key,
            call.index_weight[:, rows],
            budgets[number],
            sinks=config.sinks,
            local=config.layer_local(call.layer),
            key_start=call.key_start[:, rows],
            key_end=call.key_end[:, rows],
        )[0].long()
        if number == len(budgets) - 1:
            selected = chosen
        step.scatter_(1, chosen.where(chosen >= 0, keys), number)
    step[:, keys] = NOT_SELECTED
    order = step.gather(1, selected.where(selected >= 0, keys)).argsort(dim=1, stable=True)
    return selected.gather(1, order).int()


def attention_of(call: AttentionCall, rows: torch.Tensor) -> torch.Tensor:
    """Attention probabilities of some queries, mean over heads, fp32 `[Q, S]`."""
    heads, keys = call.query.shape[2], call.key.shape[1]
    block = max(1, PROBABILITIES_AT_ONCE // (heads * keys))
    mass = torch.zeros(len(rows), keys, device=rows.device)
    key = call.key.transpose(1, 2)
    for begin in range(0, len(rows), block):
        some = rows[begin : begin + block]
        first, stop = call.key_start[:, some], call.key_end[:, some]
        seen = int(stop.max())
        query = call.query[:, some].transpose(1, 2)
        mass[begin : begin + block, :seen] = mean_probabilities(query, key[:, :, :seen], call, first, stop)[0]
    return mass


def share_kept(mass: torch.Tensor, ranking: torch.Tensor, budgets: list[int]) -> torch.Tensor:
    """Share of each query's attention `[Q, S]` on the first `K` tokens of a ranking, fp64 `[Q, N]`."""
    chosen = mass.gather(1, ranking.clamp(min=0).long()).masked_fill_(ranking < 0, 0.0)
    return _sums(chosen, budgets)


def _best(mass: torch.Tensor, budgets: list[int]) -> torch.Tensor:
    return _sums(mass.topk(min(budgets[-1], mass.shape[1]), dim=1).values, budgets)


def _sums(ranked: torch.Tensor, budgets: list[int]) -> torch.Tensor:
    """Sums over the first `K` columns, for every budget."""
    edges = [0, *budgets]
    steps = [ranked[:, low:high].sum(dim=1, dtype=torch.float64) for low, high in pairwise(edges)]
    return torch.stack(steps, dim=1).cumsum(dim=1)
