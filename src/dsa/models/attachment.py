"""Attaching DSA to a Hugging Face model, and taking it off again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dsa.config import DSAConfig
from dsa.models import checkpoint, saving
from dsa.models.attached import AttachReport, attached_state, indexers_of, is_attached, set_trained
from dsa.models.families import Family, family_of, forget_family, full_attention_layers, name_family
from dsa.models.installing import install, uninstall
from dsa.models.latent import attaching as latent

logger = logging.getLogger("dsa")


def attach(
    model: PreTrainedModel,
    config: DSAConfig | None = None,
    *,
    indexers: str | Path | None = None,
    family: Family | None = None,
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
        family: For a model whose architecture is not in the table, the row that it needs, as `dsa check` finds it.
            Nothing else vouches for it, and only `save_indexers` saves its indexers.
        **overrides: Fields of the config to change, `top_k=512` for example.

    Returns:
        What was done, layer by layer.

    Raises:
        TypeError: Not a transformers model.
        ValueError: The model is attached already, its architecture is unknown or not a causal decoder, all its
            layers use a sliding window, the config names layers that it does not have, or the indexers belong to
            another model or have other sizes.
    """
    if family is not None:
        name_family(model, family)
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
    report = _install_savable(model, config, family, trained=stored is not None and stored.trained)
    if stored is not None:
        checkpoint.fill_indexers(model, stored)
    if not report.trained:
        logger.warning(
            "dsa: the indexers of %s are untrained (random weights), so what is selected is arbitrary; train them "
            "with `dsa train`, or pass indexers=",
            report.model,
        )
    return report


def default_config(model: PreTrainedModel) -> DSAConfig:
    """The configuration that `attach` uses when it is given none.

    Models with multi-head latent attention get DeepSeek-V3.2's sizes, and nothing is always selected: what is trained
    is then what plain transformers runs as `DeepseekV32ForCausalLM`. All others get `DSAConfig()`.
    """
    return DSAConfig() if family_of(model).latent is None else latent.default_config(model.config)


def detach(model: PreTrainedModel) -> None:
    """Takes off what `attach` put on: the model is what it was, its own weights untouched.

    Raises:
        ValueError: The model is not attached.
    """
    uninstall(model)
    saving.become_plain(model)
    forget_family(model)


@dataclass(frozen=True)
class Attachment:
    """What `take_off` took off a model, enough to put it on again.

    Args:
        config: What the model was attached with.
        weights: State of every indexer by layer number.
        trained: Whether training wrote them.
    """

    config: DSAConfig
    weights: dict[int, dict[str, torch.Tensor]]
    trained: bool


def take_off(model: PreTrainedModel) -> Attachment:
    """`detach` that keeps the indexers, for `put_on`. Raises `ValueError` where nothing is attached."""
    attached = attached_state(model)
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
    report = _install_savable(model, config, family_of(model), trained=taken.trained)
    for layer, indexer in indexers_of(model).items():
        indexer.fill(taken.weights[layer])
    return report


def _install_savable(model: PreTrainedModel, config: DSAConfig, family: Family, *, trained: bool) -> AttachReport:
    install(model, config, family=family, trained=trained)
    saving.become_savable(model, config)
    return set_trained(model, trained)
