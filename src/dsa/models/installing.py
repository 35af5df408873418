"""Indexers and hooks on a model's layers: what attaching adds, and taking it off again."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dsa.config import DSAConfig
from dsa.models import attention as dsa_attention
from dsa.models.attached import ATTACHED, Attached, AttachReport, LayerReport, attached_state, indexers_of
from dsa.models.attention import IMPLEMENTATION, PLAN, WARNED, HookedPlan, before_attention, before_decoder
from dsa.models.decoder import decoder_of
from dsa.models.families import FULL, KEPT_LAYERS, Family, attention_name, full_attention_layers, layer_types
from dsa.models.latent import attaching as latent
from dsa.models.latent.attention import LatentAttention
from dsa.models.layer import LayerPlan
from dsa.models.weights import compute_dtype, execution_device
from dsa.modules.indexer import Indexer, LatentIndexer


def install(model: PreTrainedModel, config: DSAConfig, *, family: Family, trained: bool) -> AttachReport:
    """The part of `attach` that knows no checkpoint: adds indexers and hooks. The model's class stays as it is.

    Args:
        model: A model of `family` that is not attached.
        config: Validated against the model here.
        family: Its row of the table.
        trained: What the report says of the weights.
    """
    attentions = family.attention_layers(model)
    types, full = layer_types(model.config), full_attention_layers(model.config)
    _check_layers(type(model).__name__, config, types)
    _check_patched(type(model).__name__, attentions, full)
    selections = _selections(model, config, family, attentions, full)
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
        rows.append(_layer_report(config, layer, types[layer], selections.get(layer, 1)))
        if not full[layer]:
            continue
        if family.latent is not None:
            originals.append(module)
            module = latent.replace_attention(block, family, LayerPlan(layer, config), model.config)
        else:
            parameters = tuple(inspect.signature(module.forward).parameters)
            setattr(module, PLAN, HookedPlan(layer, config, family, parameters))
            handles.append(module.register_forward_pre_hook(before_attention, with_kwargs=True))
        if config.has_indexer(layer):
            module.indexer = _new_indexer(model, block, module, config, selections[layer])
    handles.append(
        decoder_of(model).register_forward_pre_hook(partial(before_decoder, undo="dsa.detach"), with_kwargs=True)
    )
    weights = sum(p.numel() for indexer in indexers_of(model).values() for p in indexer.parameters())
    report = AttachReport(name, tuple(rows), trained, weights, config)
    setattr(model, ATTACHED, Attached(config, family, implementation, report, handles, originals))
    return report


def uninstall(model: PreTrainedModel) -> None:
    """The inverse of `install`. Raises `ValueError` where nothing is attached."""
    attached = attached_state(model)
    for handle in attached.handles:
        handle.remove()
    for module in attached.family.attention_layers(model):
        if hasattr(module, "indexer"):
            del module.indexer
        if hasattr(module, PLAN):
            delattr(module, PLAN)
    for block, original in zip(attached.family.blocks(model), attached.originals):
        latent.restore_attention(block, str(attention_name(block)), original)
    vars(decoder_of(model)).pop(WARNED, None)
    model.set_attn_implementation(attached.implementation)
    delattr(model, ATTACHED)


def _check_patched(name: str, attentions: list[Any], full: list[bool]) -> None:
    """Refuses attention whose `forward` is another library's: what it does with the arguments is not known."""
    for layer, module in enumerate(attentions):
        if not full[layer] or module is None:
            continue
        home: Any = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
        made_by = getattr(home.forward, "__module__", home.__module__)
        if made_by != home.__module__:
            raise ValueError(
                f"layer {layer} of {name} has an attention ({home.__name__}) whose forward is patched by {made_by}; "
                "dsa cannot see what that does: load the model without it"
            )


def _check_layers(name: str, config: DSAConfig, types: list[str]) -> None:
    full = [each == FULL for each in types]
    kept = [KEPT_LAYERS.get(each, each) for each in types]
    if not any(full):
        raise ValueError(
            f"{name} has nothing to select: none of its layers sees all earlier tokens; they are "
            f"{', '.join(dict.fromkeys(kept))}"
        )
    for layer, exception in config.layers.items():
        if layer >= len(full):
            raise ValueError(f"config.layers names layer {layer}, but {name} has layers 0 to {len(full) - 1}")
        if not full[layer] and not exception.dense:
            raise ValueError(f"config.layers names layer {layer} of {name}, which stays as it is ({kept[layer]})")
        if exception.share is not None and not full[exception.share]:
            raise ValueError(
                f"layers[{layer}] shares the selection of layer {exception.share}, which has none "
                f"({kept[exception.share]})"
            )


def _selections(
    model: PreTrainedModel, config: DSAConfig, family: Family, attentions: list[nn.Module], full: list[bool]
) -> dict[int, int]:
    """How many selections each sparse layer reads by; all heads of latent attention read the same rows.

    Raises:
        ValueError: They do not divide a layer's KV heads.
    """
    sparse = [layer for layer, whole in enumerate(full) if whole and not config.is_dense(layer)]
    if config.selections == 1 and not any(layer.selections for layer in config.layers.values()):
        return dict.fromkeys(sparse, 1)
    text = model.config.get_text_config(decoder=True)
    found = {}
    for layer in sparse:
        groups = 1 if family.latent is not None else _kv_heads(attentions[layer], text)
        found[layer] = config.layer_selections(layer, groups)
    return found


def _kv_heads(attention: nn.Module, config: PreTrainedConfig) -> int:
    """Of one layer; the projection of its keys says it where layers differ, and is one with others in some families."""
    features, width = (
        getattr(getattr(attention, "k_proj", None), "out_features", None),
        getattr(attention, "head_dim", 0),
    )
    if features and width:
        return int(features) // int(width)
    shared = getattr(attention, "num_key_value_groups", None)
    heads = int(config.num_attention_heads)
    return heads // shared if shared else getattr(config, "num_key_value_heads", None) or heads


def _layer_report(config: DSAConfig, layer: int, layer_type: str, selections: int) -> LayerReport:
    if layer_type != FULL:
        windows = ("sliding_attention", "chunked_attention")
        return LayerReport(layer, "sliding" if layer_type in windows else "other", layer_type=layer_type)
    if config.is_dense(layer):
        return LayerReport(layer, "dense")
    budget: dict[str, Any] = {"top_k": config.layer_top_k(layer), "local": config.layer_local(layer)}
    budget["selections"] = selections
    share = config.shared_with(layer)
    return LayerReport(layer, "sparse" if share is None else "shared", share=share, **budget)


def _new_indexer(
    model: PreTrainedModel, block: nn.Module, attention: nn.Module, config: DSAConfig, selections: int
) -> Indexer:
    text = model.config.get_text_config(decoder=True)
    with torch.device(execution_device(block)):
        if isinstance(attention, LatentAttention):
            indexer: Indexer = LatentIndexer(text.hidden_size, config, text.q_lora_rank)
        else:
            indexer = Indexer(text.hidden_size, config, selections)
        return indexer.to(compute_dtype(block)).train(attention.training)
