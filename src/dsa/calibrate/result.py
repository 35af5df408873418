"""What a calibration found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from dsa.calibrate.settings import CalibrationSettings
from dsa.config import DSAConfig
from dsa.cost import Cost
from dsa.eval.ratio import PerplexityRatio


@dataclass(frozen=True)
class LayerProposal:
    """What is proposed for one full-attention layer, and what was measured of it.

    Args:
        layer: Layer number.
        kind: `"sparse"` selects for itself, `"shared"` reads what `share` selects, `"dense"` reads everything.
        top_k: Tokens read per query; `None` for dense layers.
        share: The layer whose selection is read.
        kept: Share of the layer's attention (mean over heads and sampled queries) on what it reads.
        kept_of_oracle: The same over what the best selection of that size holds.
        effect: KL divergence, in nats per token, of the model's predictions from the dense model's when this layer
            alone is sparse; `None` where it was not measured.
        own_kept: Share kept by the layer's own selection at each budget tried.
        has_indexer: `False` for layers that stay dense because they have none.
    """

    layer: int
    kind: Literal["sparse", "shared", "dense"]
    top_k: int | None
    share: int | None
    kept: float
    kept_of_oracle: float | None
    effect: float | None
    own_kept: tuple[float, ...] = ()
    has_indexer: bool = True


@dataclass(frozen=True)
class Probe:
    """A proposal whose perplexity was measured on the calibration texts.

    Args:
        tokens_read: Per query, all layers together.
        operations: Of attention and indexers per query.
        predicted: Sum of the layers' harm: the predicted rise of the loss, in nats, where effects were measured.
        ratio: Perplexity over the dense model's.
    """

    tokens_read: float
    operations: float
    predicted: float
    ratio: float


@dataclass(frozen=True)
class UniformBudget:
    """The smallest budget that, the same in every layer with an indexer, is as good as the calibrated ones.

    Args:
        top_k: `None` where no budget that was tried is.
        ratio: Its perplexity over the dense model's, on the texts that the calibration was judged on; the best of
            all tried where none is good enough.
        cost: Per query, all layers together.
    """

    top_k: int | None
    ratio: float
    cost: Cost | None


@dataclass
class Calibration:
    """A configuration by quality and what it was found with. Costs are per query, summed over the layers.

    Args:
        model: What the model was asked for by.
        indexers: Where its indexers came from.
        settings: What was asked for.
        config: The proposal; the model is attached with it.
        texts: Tokens of each text measured on.
        verified_on: Tokens of each text that the ratio is of.
        ratio: Perplexity over the dense model's.
        layers: A row per full-attention layer.
        budgets: The values of `K` that were tried.
        cost: Predicted, mean over the second half of the texts' queries.
        dense_cost: The same of the dense model.
        probes: The proposals whose perplexity was measured on the way.
        uniform: What one budget for all layers takes; `None` where that was not asked for.
        environment: Commit, machine, threads, versions.
        seconds: Wall time.
    """

    model: str
    indexers: str | None
    settings: CalibrationSettings
    config: DSAConfig
    texts: dict[str, int]
    verified_on: dict[str, int]
    ratio: PerplexityRatio
    layers: tuple[LayerProposal, ...]
    budgets: tuple[int, ...]
    cost: Cost
    dense_cost: Cost
    probes: tuple[Probe, ...]
    uniform: UniformBudget | None
    environment: dict[str, Any]
    seconds: float = 0.0

    def count(self, kind: str) -> int:
        """How many layers are `"sparse"`, `"shared"` or `"dense"`."""
        return sum(row.kind == kind for row in self.layers)

    @property
    def is_verified_elsewhere(self) -> bool:
        """Whether the ratio is of other texts than those calibrated on."""
        return set(self.texts) != set(self.verified_on)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; means over layers where a name says so, shares between 0 and 1."""
        count = len(self.layers)
        plain: dict[str, Any] = {
            "model": self.model,
            "indexers": self.indexers,
            "settings": asdict(self.settings),
            "texts": self.texts,
            "verified_on": self.verified_on,
            "perplexity_ratio": self.ratio.ratio,
            "perplexity_ratio_low": self.ratio.low,
            "perplexity_ratio_high": self.ratio.high,
            "evaluated_tokens": self.ratio.tokens,
            "tokens_read_mean": self.cost.tokens_read / count,
            "tokens_read_mean_dense": self.dense_cost.tokens_read / count,
            "operations_of_dense": self.cost.operations / self.dense_cost.operations,
            "bytes_of_dense": self.cost.bytes / self.dense_cost.bytes,
            "layers_sparse": [row.layer for row in self.layers if row.kind == "sparse"],
            "layers_shared": [row.layer for row in self.layers if row.kind == "shared"],
            "layers_dense": [row.layer for row in self.layers if row.kind == "dense"],
            "budgets": list(self.budgets),
            "config": self.config.to_dict(),
            "layers": [asdict(row) for row in self.layers],
            "cost": asdict(self.cost),
            "cost_dense": asdict(self.dense_cost),
            "probes": [asdict(probe) for probe in self.probes],
            "uniform": None if self.uniform is None else asdict(self.uniform),
        }
        if self.uniform is not None and self.uniform.cost is not None:
            plain["tokens_read_mean_uniform"] = self.uniform.cost.tokens_read / count
        return plain | {"seconds": self.seconds, "environment": self.environment}
