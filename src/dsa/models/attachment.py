"""Attaching DSA to a Hugging Face model, and taking it off again."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dsa.config import DSAConfig
from dsa.models import attention as dsa_attention
from dsa.models.attention import IMPLEMENTATION, PLAN, WARNED, HookedPlan, before_attention, before_decoder
from dsa.models.decoder import decoder_of
from dsa.models.families import Family, family_of, full_attention_layers
from dsa.models.layer import LayerPlan
from dsa.models.native import attaching as latent
from dsa.models.native.attention import LatentAttention
from dsa.modules.indexer import Indexer, LatentIndexer

logger = logging.getLogger("dsa")

ATTACHED = "dsa_attached"
"""Attribute of an attached model that says so."""

LayerKind = Literal["sparse", "shared", "dense", "sliding"]


@dataclass(frozen=True)
class LayerReport:
    """What attaching did to one layer.

    Args:
        layer: Layer number.
        kind: `"sparse"` has its own indexer, `"shared"` reuses the selection of layer `share`, `"dense"` keeps
            full attention because the config says so, `"sliding"` keeps the model's own window.
        top_k: Tokens read per query; `None` where the layer reads all it sees.
        local: Most recent tokens always read.
        share: The layer whose selection is reused.
    """

    layer: int
    kind: LayerKind
    top_k: int | None = None
    local: int | None = None
    share: int | None = None

    def describe(self) -> str:
        """One phrase, equal for layers that were treated the same."""
        if self.kind == "sparse":
            always = f", the last {self.local} always" if self.local else ""
            return f"sparse, reads {self.top_k} tokens per query{always}"
        if self.kind == "shared":
            return f"sparse, reads what layer {self.share} selected"
        if self.kind == "dense":
            return "dense, as configured"
        return "left as it is: sliding window"


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did, layer by layer; prints as a short table.

    Args:
        model: Class of the model before attaching.
        layers: One row per layer.
        trained: Whether the indexers came from a checkpoint.
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
class _Attached:
    """What `detach` needs to undo everything; kept on the model as `dsa_attached`."""

    config: DSAConfig
    family: Family
    implementation: str
    report: AttachReport
    handles: list[RemovableHandle]
    originals: list[nn.Module]
    """Attention modules in whose place others stand, layer by layer; for latent attention only."""


def attach(
    model: PreTrainedModel,
    config: DSAConfig | None = None,
    *,
    indexers: str | Path | None = None,
    **overrides: Any,
) -> AttachReport:
    """Gives a model's full-attention layers an indexer each and makes their attention sparse, in place.

    Sliding-window layers stay as they are. While no query sees more than `top_k` tokens the model computes what
    it did before. `detach` undoes everything.

    Args:
        model: A causal language model out of the supported families (`dsa.models.families`).
        config: Sizes and budget. Without one: what was saved with the indexers, or the defaults
            (`default_config`).
        indexers: A safetensors file written by `dsa train` or `save_indexers`, or the folder it is in;
            `"default"` for those shipped for the embedded default model; `None` for random ones.
        **overrides: Fields of the config to change, `top_k=512` for example.

    Returns:
        What was done, layer by layer.

    Raises:
        TypeError: Not a transformers model.
        ValueError: The model is attached already, its architecture is unknown or not a causal decoder, all its
            layers use a sliding window, the config names layers that it does not have, or the indexers belong to
            another model or have other sizes.
    """
    from dsa.models import checkpoint

    family = family_of(model)
    if is_attached(model):
        raise ValueError(f"{type(model).__name__} is attached already; call dsa.detach(model) first")
    stored = None if indexers is None else checkpoint.read_indexers(indexers)
    if config is None:
        config = default_config(model) if stored is None else stored.config
    config = config.replace(**overrides)
    if family.latent is not None:
        config = latent.resolved(config, model.config)
    if stored is not None:
        checkpoint.check_indexers(stored, model, config)
    report = install(model, config, family=family, trained=stored is not None)
    if stored is not None:
        checkpoint.fill_indexers(model, stored)
    else:
        logger.warning(
            "dsa: the indexers of %s are untrained (random weights), so what is selected is arbitrary; train them "
            "with `dsa train`, or pass indexers=",
            report.model,
        )
    return report


def default_config(model: PreTrainedModel) -> DSAConfig:
    """What `attach` gives a model for which nothing is said.

    Models with multi-head latent attention get DeepSeek-V3.2's sizes, and nothing is always selected: what is trained
    is then what plain transformers runs as `DeepseekV32ForCausalLM`. All others get `DSAConfig()`.
    """
    return DSAConfig() if family_of(model).latent is None else latent.default_config(model.config)


def install(model: PreTrainedModel, config: DSAConfig, *, family: Family, trained: bool) -> AttachReport:
    """The part of `attach` that knows no checkpoint: adds indexers and hooks, and changes the model's class.

    Args:
        model: A model of `family` that is not attached.
        config: Validated against the model here.
        family: Its row of the table.
        trained: What the report says of the weights.
    """
    from dsa.models import saving

    attentions = family.attention_layers(model)
    full = full_attention_layers(model.config)
    _check_layers(type(model).__name__, config, full)
    implementation = model.config._attn_implementation
    dsa_attention.register()
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"{type(model).__name__} refused attn_implementation={IMPLEMENTATION!r}: it does not use transformers' "
            "attention interface"
        )
    rows, handles, originals = [], [], []
    name = type(model).__name__
    for layer, (block, module) in enumerate(zip(family.blocks(model), attentions)):
        rows.append(_layer_report(config, layer, full[layer]))
        if not full[layer]:
            continue
        if family.latent is not None:
            originals.append(module)
            layout = latent.layout_of(family, model.config)
            module = latent.put_in_place(block, family, LayerPlan(layer, config), layout)
        else:
            parameters = tuple(inspect.signature(module.forward).parameters)
            setattr(module, PLAN, HookedPlan(layer, config, family, parameters))
            handles.append(module.register_forward_pre_hook(before_attention, with_kwargs=True))
        if config.has_indexer(layer):
            module.indexer = _new_indexer(model, module, config)
    handles.append(decoder_of(model).register_forward_pre_hook(before_decoder, with_kwargs=True))
    saving.become_savable(model, config)
    weights = sum(p.numel() for indexer in indexers_of(model).values() for p in indexer.parameters())
    report = AttachReport(name, tuple(rows), trained, weights, config)
    setattr(model, ATTACHED, _Attached(config, family, implementation, report, handles, originals))
    return report


def detach(model: PreTrainedModel) -> None:
    """Takes off what `attach` put on: the model is what it was, its own weights untouched.

    Raises:
        ValueError: The model is not attached.
    """
    from dsa.models import saving

    attached = _attached(model)
    for handle in attached.handles:
        handle.remove()
    for module in attached.family.attention_layers(model):
        if hasattr(module, "indexer"):
            del module.indexer
        if hasattr(module, PLAN):
            delattr(module, PLAN)
    for block, original in zip(attached.family.blocks(model), attached.originals):
        latent.give_back(block, attached.family.attention, original)
    vars(decoder_of(model)).pop(WARNED, None)
    saving.become_plain(model)
    model.set_attn_implementation(attached.implementation)
    delattr(model, ATTACHED)


@dataclass(frozen=True)
class Attachment:
    """What `take_off` took off a model, enough to put it on again.

    Args:
        config: What the model was attached with.
        weights: State of every indexer by layer number.
        trained: Whether they came from a checkpoint.
    """

    config: DSAConfig
    weights: dict[int, dict[str, torch.Tensor]]
    trained: bool


def take_off(model: PreTrainedModel) -> Attachment:
    """`detach` that keeps the indexers, for `put_on`. Raises `ValueError` where nothing is attached."""
    attached = _attached(model)
    weights = {layer: indexer.state_dict() for layer, indexer in indexers_of(model).items()}
    taken = Attachment(attached.config, weights, attached.report.trained)
    detach(model)
    return taken


def put_on(model: PreTrainedModel, taken: Attachment, **overrides: Any) -> AttachReport:
    """Attaches a model with the indexers that `take_off` kept.

    Args:
        model: The same model, not attached.
        taken: What was taken off.
        **overrides: Fields of the config to change; sizes of the indexers cannot.

    Raises:
        ValueError: A field out of range, another size, or a layer that has no indexer among those kept. The
            model is then not attached.
    """
    config = taken.config.replace(**overrides)
    for name in ("index_heads", "index_head_dim", "rope_dim"):
        if getattr(config, name) != getattr(taken.config, name):
            raise ValueError(f"{name} is {getattr(taken.config, name)} in these indexers, got {getattr(config, name)}")
    full = full_attention_layers(model.config)
    wanted = [layer for layer, whole in enumerate(full) if whole and config.has_indexer(layer)]
    missing = [layer for layer in wanted if layer not in taken.weights]
    if missing:
        raise ValueError(f"layer {missing[0]} had no indexer, so it cannot become sparse without training; leave it")
    report = install(model, config, family=family_of(model), trained=taken.trained)
    for layer, indexer in indexers_of(model).items():
        indexer.load_state_dict(taken.weights[layer])
    return report


def is_attached(model: nn.Module) -> bool:
    """Whether `attach` was called on this model and not undone."""
    return hasattr(model, ATTACHED)


def report_of(model: PreTrainedModel) -> AttachReport:
    """What `attach` returned for this model. Raises `ValueError` where nothing is attached."""
    return _attached(model).report


def config_of(model: PreTrainedModel) -> DSAConfig:
    """What this model is attached with. Raises `ValueError` where nothing is attached."""
    return _attached(model).config


def indexers_of(model: PreTrainedModel) -> dict[int, Indexer]:
    """The indexers by layer number; layers left dense, sliding or sharing have none."""
    attentions = family_of(model).attention_layers(model)
    found = {layer: getattr(module, "indexer", None) for layer, module in enumerate(attentions)}
    return {layer: cast(Indexer, indexer) for layer, indexer in found.items() if indexer is not None}


def _attached(model: PreTrainedModel) -> _Attached:
    attached = getattr(model, ATTACHED, None)
    if attached is None and hasattr(model, "dsa_accelerated"):
        raise ValueError(
            f"{type(model).__name__} has indexers of its own and is accelerated, not attached; this works on attached "
            "models only. dsa generate and dsa.accelerate run it sparse"
        )
    if attached is None:
        raise ValueError(f"{type(model).__name__} is not attached; call dsa.attach(model, ...) first")
    return attached


def _check_layers(name: str, config: DSAConfig, full: list[bool]) -> None:
    if not any(full):
        raise ValueError(f"every layer of {name} uses a sliding window, so there is nothing for dsa to make sparse")
    for layer, exception in config.layers.items():
        if layer >= len(full):
            raise ValueError(f"config.layers names layer {layer}, but {name} has layers 0 to {len(full) - 1}")
        if not full[layer] and not exception.dense:
            raise ValueError(f"config.layers names layer {layer} of {name}, which uses a sliding window and stays so")
        if exception.share is not None and not full[exception.share]:
            raise ValueError(
                f"layers[{layer}] shares the selection of layer {exception.share}, which uses a sliding window"
            )


def _layer_report(config: DSAConfig, layer: int, full: bool) -> LayerReport:
    if not full:
        return LayerReport(layer, "sliding")
    if config.is_dense(layer):
        return LayerReport(layer, "dense")
    budget = {"top_k": config.layer_top_k(layer), "local": config.layer_local(layer)}
    share = config.shared_with(layer)
    return LayerReport(layer, "sparse" if share is None else "shared", share=share, **budget)


def _new_indexer(model: PreTrainedModel, attention: nn.Module, config: DSAConfig) -> Indexer:
    reference = next(attention.parameters())
    dtype = reference.dtype if reference.is_floating_point() else torch.float32
    text = model.config.get_text_config(decoder=True)
    with torch.device(reference.device):
        if isinstance(attention, LatentAttention):
            indexer: Indexer = LatentIndexer(text.hidden_size, config, text.q_lora_rank)
        else:
            indexer = Indexer(text.hidden_size, config)
        return indexer.to(dtype).train(attention.training)
