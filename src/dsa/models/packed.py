"""Packed layers inside a model: put there, kept in its configuration, saved and loaded with it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dsa.modules.packed_linear import BF16, PackedEmbedding, PackedLinear, PackedMatrix
from dsa.ops.packed_linear.types import FORMATS

LOADS_PACKED = "loads_packed_weights"
"""An attribute of the model classes that make packed layers when they are loaded."""

_SAVE = "save_pretrained"


def packed_layers(model: nn.Module) -> dict[str, PackedMatrix]:
    """By name, the layers whose weights are packed."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedMatrix)}


def remember(model: PreTrainedModel) -> None:
    """Keeps what is packed in the configuration, so that it is saved and loaded, and unties what is packed.

    Only the classes of attached models know such layers, so saving any other one is refused.
    """
    layers = packed_layers(model)
    vars(model.config).pop("dsa_weights", None)
    vars(model).pop("_tied_weights_keys", None)
    if not layers:
        if getattr(vars(model).get(_SAVE), "__func__", None) is _save_packed:
            vars(model).pop(_SAVE)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        return
    model.config.dsa_weights = {
        name: {"format": module.format, **({"shared": True} if module.source is not module else {})}
        for name, module in layers.items()
    }
    head = model.get_output_embeddings()
    if isinstance(head, PackedMatrix):
        vars(model)["_tied_weights_keys"] = {}
        model.all_tied_weights_keys = {}
    vars(model)[_SAVE] = MethodType(_save_packed, model)


def _save_packed(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of a model whose weights are packed."""
    check_savable(self)
    return type(self).save_pretrained(self, *args, **kwargs)


def check_savable(model: PreTrainedModel) -> None:
    """Refuses to save packed weights with a class that would not load them. Raises `ValueError`."""
    if packed_layers(model) and not getattr(type(model), LOADS_PACKED, False):
        raise ValueError(
            f"save_pretrained: the weights of this {type(model).__name__} are packed, and only attached models are "
            "saved that way; dsa.attach it, or dsa.pack_weights(model, 'fp32') first"
        )


# Copied and pickled with the model, the method is found again by this name.
_save_packed.__name__ = _SAVE


def make_room(model: PreTrainedModel, stored: Mapping[str, Mapping[str, Any]]) -> None:
    """Exchanges layers of a model that is being loaded for empty packed ones, as `config.dsa_weights` names them.

    Args:
        model: Made from its configuration, weights not loaded yet; a decoder without its head, too.
        stored: What `remember` wrote.

    Raises:
        ValueError: A layer or a format that there is not.
    """
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    headless = model.get_output_embeddings() is None
    # What shares another layer's blocks comes after that one.
    for name, entry in sorted(stored.items(), key=lambda each: bool(each[1].get("shared"))):
        own = name if name in modules else name.removeprefix(prefix)
        layer, format = modules.get(own), entry.get("format")
        if headless and own not in modules and "." not in name:
            continue
        if not isinstance(layer, nn.Linear | nn.Embedding) or not (format == BF16 or format in FORMATS):
            raise ValueError(
                f"model: config.json names {name} in format {format!r} under dsa_weights, expected a linear layer or "
                f"an embedding of this {type(model).__name__} and one of {BF16}, {', '.join(FORMATS)}; save it again"
            )
        shared = model.get_input_embeddings() if entry.get("shared") else None
        put(model, own, empty_like(layer, str(format), shared if isinstance(shared, PackedMatrix) else None))
    remember(model)


def empty_like(layer: nn.Module, format: str, shared: PackedMatrix | None = None) -> PackedMatrix:
    """A packed layer of the sizes of a plain one, with the same bias."""
    if isinstance(layer, nn.Embedding):
        return PackedEmbedding(layer.num_embeddings, layer.embedding_dim, format, dtype=layer.weight.dtype)
    assert isinstance(layer, nn.Linear)
    made = PackedLinear(layer.in_features, layer.out_features, format, dtype=layer.weight.dtype, shared=shared)
    made.bias = layer.bias
    return made


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Sets a submodule by its full name, in the mode of the one before."""
    parent, _, last = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), last, module)
