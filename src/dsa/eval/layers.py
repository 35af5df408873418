"""Attention kept and tokens found, layer by layer and by position, for any selections on the dense model's activations.

Shapes: `B = 1` text, `T` query tokens, `K` tokens read per query.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dsa.config import DSAConfig
from dsa.eval.mass import PROBABILITIES_AT_ONCE, mean_probabilities
from dsa.eval.selections import Selection, selections_of
from dsa.models.context import AttentionCall
from dsa.ops import index_topk

BINS = 8
SUSPECT_DEVIATIONS = 3.5
"""Robust standard deviations below the median from which on a layer is named."""
LEAST_DEVIATION = 0.005
"""Layers whose shares differ less than this are alike, however narrow the rest lies."""


def indexer_selection(config: DSAConfig) -> Selection:
    """What each layer would read with the activations of a dense pass: `index_topk` on its stored index keys."""

    def select(call: AttentionCall) -> torch.Tensor:
        assert call.index_query is not None
        assert call.index_key is not None
        assert call.index_weight is not None
        return index_topk(
            call.index_query,
            call.index_key,
            call.index_weight,
            config.layer_top_k(call.layer),
            sinks=config.sinks,
            local=config.layer_local(call.layer),
            key_start=call.key_start,
            key_end=call.key_end,
        )

    return select


@dataclass
class LayerObserver:
    """An observer for a pass with `mode="dense"`; afterwards `figures()` has what every layer's selections keep.

    Where queries make several selections, each is measured on the heads that read it; figures are means over these.

    Args:
        config: What the model is attached with.
        selections: By name. The oracle is measured next to them.
        start: First query that counts.
        rows: By layer, then by figure: one value a query, fp32 `[T - start]`.
    """

    config: DSAConfig
    selections: Mapping[str, Selection]
    start: int
    rows: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, call: AttentionCall) -> None:
        cut = {name: getattr(call, name)[:, self.start :] for name in ("query", "key_start", "key_end")}
        if call.index_query is not None and call.index_weight is not None:
            cut |= {
                "index_query": call.index_query[:, self.start :],
                "index_weight": call.index_weight[:, self.start :],
            }
        top_k = self.config.layer_top_k(call.layer)
        found = []
        for part in dataclasses.replace(call, **cut).by_selection(selections_of(call, self.config)):
            found.append(kept_by(part, {name: select(part) for name, select in self.selections.items()}, top_k))
        self.rows[call.layer] = {name: torch.stack([each[name] for each in found]).mean(dim=0) for name in found[0]}

    def figures(self) -> list[dict[str, Any]]:
        """One row a layer: `mass` and `recall` by selection, and both in eight stretches of equal length."""
        found = []
        for layer, row in sorted(self.rows.items()):
            figures: dict[str, Any] = {"layer": layer, "top_k": self.config.layer_top_k(layer)}
            for figure in ("mass", "recall"):
                values = {name.partition(" ")[2]: each for name, each in row.items() if name.startswith(figure)}
                figures[figure] = {name: float(each.double().mean()) for name, each in values.items()}
                figures[f"{figure}_by_position"] = {
                    name: [float(part.double().mean()) for part in each.tensor_split(min(BINS, len(each)))]
                    for name, each in values.items()
                }
            found.append(figures)
        return found


def kept_by(call: AttentionCall, chosen: Mapping[str, torch.Tensor], top_k: int) -> dict[str, torch.Tensor]:
    """Per query, `"mass NAME"` and `"recall NAME"` of every selection, and `"mass oracle"`; fp32 `[T]` each.

    Recall is the share of the oracle's tokens, those with any attention, that are among the chosen ones.
    """
    query, key = call.query.transpose(1, 2), call.key.transpose(1, 2)
    heads, tokens, keys = query.shape[1], query.shape[2], key.shape[2]
    rows = max(1, PROBABILITIES_AT_ONCE // (heads * keys))
    parts: dict[str, list[torch.Tensor]] = {}
    for begin in range(0, tokens, rows):
        block = slice(begin, min(begin + rows, tokens))
        first, stop = call.key_start[:, block], call.key_end[:, block]
        seen = max(1, int(stop.max()))
        mass = mean_probabilities(query[:, :, block], key[:, :, :seen], call, first, stop)
        best = mass.topk(min(top_k, seen), dim=2, sorted=False)
        wanted = best.values > 0
        parts.setdefault("mass oracle", []).append(best.values.sum(dim=2)[0].cpu())
        for name, indices in chosen.items():
            places, valid = indices[:, block].clamp(min=0).long(), indices[:, block] >= 0
            is_chosen = torch.zeros_like(mass).scatter_add_(2, places, valid.to(mass.dtype))
            found = (is_chosen.gather(2, best.indices) * wanted).sum(dim=2) / wanted.sum(dim=2)
            parts.setdefault(f"mass {name}", []).append((mass * is_chosen).sum(dim=2)[0].cpu())
            parts.setdefault(f"recall {name}", []).append(found[0].cpu())
    return {name: torch.cat(each) for name, each in parts.items()}


def suspect_layers(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Layers whose indexer finds far less than the other layers' do.

    A layer's share is the attention kept on its indexer's selection over that on the oracle's. It stands out where it
    lies 3.5 robust standard deviations (1.4826 times the median distance from the median, at least 0.005) below the
    median of the layers. With fewer than three layers nothing can stand out.

    Returns:
        `layer`, `share`, `median` and `deviations`, the worst first.
    """
    shares = {int(row["layer"]): row["mass"]["dsa"] / row["mass"]["oracle"] for row in layers if "dsa" in row["mass"]}
    if len(shares) < 3:
        return []
    median = statistics.median(shares.values())
    spread = 1.4826 * statistics.median(abs(each - median) for each in shares.values())
    spread = max(spread, LEAST_DEVIATION)
    found = [
        {"layer": layer, "share": share, "median": median, "deviations": (median - share) / spread}
        for layer, share in shares.items()
        if (median - share) / spread > SUSPECT_DEVIATIONS
    ]
    return sorted(found, key=lambda each: each["share"])
