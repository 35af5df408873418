"""What is attached to a model: the report, the configuration and the indexers of every layer.

Knows no checkpoint and changes nothing; `dsa.models.attachment` attaches.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, cast

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dsa.config import DSAConfig
from dsa.models.families import KEPT_LAYERS, Family, family_of
from dsa.modules.indexer import Indexer

ATTACHED = "dsa_attached"
"""Attribute of an attached model that says so."""

ACCELERATED = "dsa_accelerated"
"""Attribute of an accelerated model that says so."""

LayerKind = Literal["sparse", "shared", "dense", "sliding", "other"]


@dataclass(frozen=True)
class LayerReport:
    """What attaching did to one layer.

    Args:
        layer: Layer number.
        kind: `"sparse"` has its own indexer, `"shared"` reuses the selection of layer `share`, `"dense"` keeps
            full attention because the config says so, `"sliding"` keeps the model's own window, `"other"` is no
            attention over earlier tokens: linear, a state, a convolution.
        top_k: Tokens read per query; `None` where the layer reads all it sees.
        local: Most recent tokens always read.
        share: The layer whose selection is reused.
        layer_type: transformers' word for the layer.
        selections: Selections of each query.
    """

    layer: int
    kind: LayerKind
    top_k: int | None = None
    local: int | None = None
    share: int | None = None
    layer_type: str = "full_attention"
    selections: int = 1

    def describe(self) -> str:
        """One phrase, equal for layers that were treated the same."""
        if self.kind == "sparse":
            always = f", the last {self.local} always" if self.local else ""
            several = f" by each of {self.selections} selections" if self.selections > 1 else ""
            return f"sparse, reads {self.top_k} tokens per query{several}{always}"
        if self.kind == "shared":
            return f"sparse, reads what layer {self.share} selected"
        if self.kind == "dense":
            return "dense, as configured"
        return f"left as it is: {KEPT_LAYERS.get(self.layer_type, self.layer_type)}"


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did, layer by layer; prints as a short table.

    Args:
        model: Class of the model before attaching.
        layers: One row per layer.
        trained: Whether training wrote the indexers' weights. Saved ones say so themselves.
        parameters: Weights in all indexers.
        config: What the model is attached with.
    """

    model: str
    layers: tuple[LayerReport, ...]
    trained: bool
    parameters: int
    config: DSAConfig = field(repr=False)

    def count(self, kind: LayerKind) -> int:
        """How many layers are of that kind."""
        return sum(row.kind == kind for row in self.layers)

    def __str__(self) -> str:
        state = "trained" if self.trained else "UNTRAINED (random: train them before relying on the output)"
        lines = [f"{self.model}: {self.count('sparse')} indexers, {self.parameters:,} weights, {state}"]
        first = 0
        for number, row in enumerate(self.layers):
            following = self.layers[number + 1] if number + 1 < len(self.layers) else None
            if following is not None and following.describe() == row.describe():
                continue
            span = f"layer {first}" if first == number else f"layers {first}-{number}"
            lines.append(f"  {span}: {row.describe()}")
            first = number + 1
        return "\n".join(lines)


@dataclass
class Attached:
    """What is needed to undo everything; kept on the model as `dsa_attached`."""

    config: DSAConfig
    family: Family
    implementation: str
    report: AttachReport
    handles: list[RemovableHandle]
    originals: list[nn.Module]
    """Attention modules that were replaced, layer by layer; for latent attention only."""


def is_attached(model: nn.Module) -> bool:
    """Whether `attach` was called on this model and not undone."""
    return hasattr(model, ATTACHED)


def report_of(model: PreTrainedModel) -> AttachReport:
    """What `attach` returned for this model. Raises `ValueError` where nothing is attached."""
    return attached_state(model).report


def set_trained(model: PreTrainedModel, trained: bool) -> AttachReport:
    """Notes whether training wrote an attached model's indexers, for its report and what is saved; the new report."""
    attached = attached_state(model)
    attached.report = replace(attached.report, trained=trained)
    if hasattr(model.config, "dsa"):
        model.config.dsa_trained = trained
    return attached.report


def config_of(model: PreTrainedModel) -> DSAConfig:
    """What this model is attached with. Raises `ValueError` where nothing is attached."""
    return attached_state(model).config


def indexers_of(model: PreTrainedModel) -> dict[int, Indexer]:
    """The indexers by layer number; layers left dense, sliding or sharing have none."""
    attentions = family_of(model).attention_layers(model)
    found = {layer: getattr(module, "indexer", None) for layer, module in enumerate(attentions)}
    return {layer: cast(Indexer, indexer) for layer, indexer in found.items() if indexer is not None}


def attached_state(model: PreTrainedModel) -> Attached:
    """All that is kept of an attachment. Raises `ValueError` where nothing is attached."""
    attached = getattr(model, ATTACHED, None)
    if attached is None and hasattr(model, ACCELERATED):
        raise ValueError(
            f"{type(model).__name__} has indexers of its own and is accelerated, not attached; this works on attached "
            "models only. dsa generate and dsa.accelerate run it sparse"
        )
    if attached is None:
        raise ValueError(f"{type(model).__name__} is not attached; call dsa.attach(model, ...) first")
    return attached
