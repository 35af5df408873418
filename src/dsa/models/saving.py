"""Saving attached models so that plain `AutoModelForCausalLM.from_pretrained` loads them.

Every family gets a configuration class and a model class of its own (`dsa_llama`, ...), registered with
transformers. A live model changes to that class when it is attached and back when it is detached; loading builds
the class directly, indexers included. The saved folder also carries a stub for processes that did not import dsa:
there `trust_remote_code=True` imports it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsa.config import DSAConfig
from dsa.models.families import ATTACHABLE, Family, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

STUB_MODULE = "modeling_dsa"


@cache
def dsa_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class `dsa_<model_type>` of a family."""
    base = ATTACHABLE[model_type].config_class()
    return type(f"DSA{base.__name__}", (base,), {"model_type": f"dsa_{model_type}", "__module__": __name__})


@cache
def dsa_model_class(model_type: str) -> type[PreTrainedModel]:
    """The model class of a family that carries its indexers."""
    family = ATTACHABLE[model_type]
    base = family.model_class()

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        from dsa.models.installing import install

        stored = getattr(config, "dsa", None)
        if stored is None:
            raise ValueError(
                f"{type(self).__name__} needs config.dsa, which dsa.attach and save_pretrained write; "
                f"use {base.__name__} for a model without indexers"
            )
        base.__init__(self, config, *args, **kwargs)
        config_of_indexers = DSAConfig.from_dict(stored)
        install(self, config_of_indexers, family=family, trained=True)
        become_savable(self, config_of_indexers)

    def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        base.save_pretrained(self, save_directory, *args, **kwargs)
        (Path(save_directory) / f"{STUB_MODULE}.py").write_text(_stub(model_type))

    def from_pretrained(cls: type, source: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        load = base.from_pretrained.__func__  # type: ignore[attr-defined]
        model, info = load(cls, source, *args, output_loading_info=True, **kwargs)
        lost = sorted(key for key in info["missing_keys"] if ".indexer." in key)
        if lost:
            raise ValueError(f"{source} lacks {len(lost)} indexer weights, {lost[0]} first; save the model again")
        return (model, info) if output_loading_info else model

    return type(
        f"DSA{base.__name__}",
        (base,),
        {
            "__init__": __init__,
            "save_pretrained": save_pretrained,
            "from_pretrained": classmethod(from_pretrained),
            "config_class": dsa_config_class(model_type),
            "__module__": __name__,
            "__doc__": f"{base.__name__} with an indexer on every sparse layer.",
        },
    )


def __getattr__(name: str) -> type:
    """`DSALlamaForCausalLM` and its like, made when they are asked for."""
    for model_type, family in ATTACHABLE.items():
        if name == f"DSA{family.causal_lm}":
            return dsa_model_class(model_type)
        if name == f"DSA{family.config}":
            return dsa_config_class(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_configs() -> None:
    """Registers every family's configuration with `AutoConfig`."""
    from transformers.models.auto.configuration_auto import AutoConfig

    for model_type in ATTACHABLE:
        AutoConfig.register(f"dsa_{model_type}", dsa_config_class(model_type), exist_ok=True)


def register_models() -> None:
    """Registers every family's model with `AutoModelForCausalLM`, and what transformers keys by model type."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    for model_type in ATTACHABLE:
        AutoModelForCausalLM.register(dsa_config_class(model_type), dsa_model_class(model_type), exist_ok=True)
        conversion = get_checkpoint_conversion_mapping(model_type)
        if conversion is not None:
            register_checkpoint_conversion_mapping(f"dsa_{model_type}", conversion, overwrite=True)


def become_savable(model: PreTrainedModel, config: DSAConfig) -> None:
    """Gives an attached causal language model the classes that save and load its indexers.

    Models that are not exactly the family's causal language model (a classifier, a user's subclass) keep their
    class: they run sparse, and their indexers are saved with `save_indexers`.
    """
    family = family_of(model)
    if type(model) is family.model_class():
        model.__class__ = dsa_model_class(family.model_type)
        model.config.__class__ = dsa_config_class(family.model_type)
    if isinstance(model, dsa_model_class(family.model_type)):
        model.config.dsa = config.to_dict()
        model.config.auto_map = {
            "AutoConfig": f"{STUB_MODULE}.{model.config.__class__.__name__}",
            "AutoModelForCausalLM": f"{STUB_MODULE}.{model.__class__.__name__}",
        }


def become_plain(model: PreTrainedModel) -> None:
    """The inverse of `become_savable`."""
    family = family_of(model)
    if not isinstance(model, dsa_model_class(family.model_type)):
        return
    model.__class__ = family.model_class()
    model.config.__class__ = family.config_class()
    # A loaded configuration also has its type as an attribute of its own, which would hide the class's.
    for attribute in ("dsa", "auto_map", "model_type"):
        vars(model.config).pop(attribute, None)


def _stub(model_type: str) -> str:
    family: Family = ATTACHABLE[model_type]
    names = f"DSA{family.config}, DSA{family.causal_lm}"
    return (
        '"""Loads this model through the package dsa-attention, which must be installed."""\n\n'
        f"from dsa.models.saving import {names}  # noqa: F401\n"
    )
