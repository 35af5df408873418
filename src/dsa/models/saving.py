"""Saving attached models so that plain `AutoModelForCausalLM.from_pretrained` loads them.

Every family has a configuration class and a model class of its own (`dsa_llama`, ...), made and registered with
transformers when one is first asked for (`dsa._auto_classes` says by whom). A live model changes to that class when it
is attached and back when it is detached; loading builds the class directly, indexers included. The saved folder also
carries a stub for processes that did not import dsa: there `trust_remote_code=True` imports it.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from threading import Lock
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

from dsa.config import DSAConfig
from dsa.models.families import ATTACHABLE, IMPLEMENTATION, Family, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger("dsa")

STUB_MODULE = "modeling_dsa"

_config_classes: dict[str, type[PreTrainedConfig]] = {}
_model_classes: dict[str, type[PreTrainedModel]] = {}
_decoder_classes: dict[str, type[PreTrainedModel]] = {}
_SAVE = "save_pretrained"
_making = Lock()
"""Two threads that load models must not make two classes of one name: transformers looks models up by class."""


def dsa_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class `dsa_<model_type>` of a family."""
    if model_type not in _config_classes:
        base = ATTACHABLE[model_type].config_class()
        with _making:
            if model_type not in _config_classes:
                made = _make_config_class(base, f"dsa_{model_type}")
                _register_config(model_type, base, made)
                _config_classes[model_type] = made
        share_adapter_targets()
    return _config_classes[model_type]


def _make_config_class(base: type[PreTrainedConfig], model_type: str) -> type[PreTrainedConfig]:
    def to_diff_dict(self: PreTrainedConfig) -> dict[str, Any]:
        # What is written. A class that knows no indexers, as the family's own, then refuses to run the weights: it
        # would read the whole text and never say so.
        return {**base.to_diff_dict(self), "attn_implementation": IMPLEMENTATION}

    attributes = {"model_type": model_type, "to_diff_dict": to_diff_dict, "__module__": __name__}
    return type(f"DSA{base.__name__}", (base,), attributes)


def share_adapter_targets() -> None:
    """Gives the model types made so far their family's rows in PEFT's tables, where PEFT was imported.

    The tables say which layers an adapter goes to whose configuration names none.
    """
    tables = vars(sys.modules["peft.utils.constants"]) if "peft.utils.constants" in sys.modules else {}
    for name, table in list(tables.items()):
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            for model_type in list(_config_classes):
                if model_type in table:
                    table.setdefault(f"dsa_{model_type}", table[model_type])


def dsa_model_class(model_type: str) -> type[PreTrainedModel]:
    """The model class of a family that carries its indexers."""
    if model_type not in _model_classes:
        config_class, base = dsa_config_class(model_type), ATTACHABLE[model_type].model_class()
        with _making:
            if model_type not in _model_classes:
                made = _make_model_class(ATTACHABLE[model_type], base, config_class)
                _register_model(model_type, made)
                _model_classes[model_type] = made
    return _model_classes[model_type]


def dsa_decoder_class(model_type: str) -> type[PreTrainedModel]:
    """The class of a family's decoder without its head, for `AutoModel`, that carries its indexers."""
    if model_type not in _decoder_classes:
        from transformers.models.auto.modeling_auto import MODEL_MAPPING, AutoModel

        config_class = dsa_config_class(model_type)
        base = cast("type[PreTrainedModel]", MODEL_MAPPING[ATTACHABLE[model_type].config_class()])
        with _making:
            if model_type not in _decoder_classes:
                made = _make_model_class(ATTACHABLE[model_type], base, config_class)
                AutoModel.register(config_class, made, exist_ok=True)
                _decoder_classes[model_type] = made
    return _decoder_classes[model_type]


def _make_model_class(
    family: Family, base: type[PreTrainedModel], config_class: type[PreTrainedConfig]
) -> type[PreTrainedModel]:
    model_type = family.model_type

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        from dsa.models.attached import set_trained
        from dsa.models.installing import install
        from dsa.runs.json_files import parse_json

        stored = getattr(config, "dsa", None)
        if stored is None:
            raise ValueError(
                f"{type(self).__name__} needs config.dsa, which dsa.attach and save_pretrained write; "
                f"use {base.__name__} for a model without indexers"
            )
        if config._attn_implementation == IMPLEMENTATION:
            # The model's own, for when it is detached; attaching comes next.
            config._attn_implementation = None
        base.__init__(self, config, *args, **kwargs)
        subject = f"model: the field dsa in config.json of {config.name_or_path or type(self).__name__}"
        config_of_indexers = parse_json(json.dumps(stored), DSAConfig, subject, "save the model again")
        if getattr(config, "dsa_weights", None):
            from dsa.models.packed import make_room

            make_room(self, config.dsa_weights)
        # Models without the field are from before it.
        trained = getattr(config, "dsa_trained", True)
        if not isinstance(trained, bool):
            raise ValueError(f"model: dsa_trained in config.json must be true or false, got {trained!r}")
        install(self, config_of_indexers, family=family, trained=trained)
        become_savable(self, config_of_indexers)
        set_trained(self, trained)

    def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        base.save_pretrained(self, save_directory, *args, **kwargs)
        (Path(save_directory) / f"{STUB_MODULE}.py").write_text(_stub(model_type))

    def from_pretrained(cls: type, source: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        load = base.from_pretrained.__func__  # type: ignore[attr-defined]
        model, info = load(cls, source, *args, output_loading_info=True, **kwargs)
        lost = sorted(key for key in info["missing_keys"] if ".indexer." in key)
        if lost:
            raise ValueError(
                f"model: {lost[0]} is missing in {source} ({len(lost)} weights of indexers in all); save it again"
            )
        return (model, info) if output_loading_info else model

    return type(
        family.saved_name(base.__name__),
        (base,),
        {
            "__init__": __init__,
            "save_pretrained": save_pretrained,
            "from_pretrained": classmethod(from_pretrained),
            "config_class": config_class,
            "loads_packed_weights": True,
            "__module__": __name__,
            "__doc__": f"{base.__name__} with an indexer on every sparse layer.",
        },
    )


def __getattr__(name: str) -> type:
    """`DSALlamaForCausalLM`, `DSALlamaModel`, `DSALlamaConfig` and their like, made when they are asked for."""
    for model_type, family in ATTACHABLE.items():
        if name == family.saved_class:
            return dsa_model_class(model_type)
        if name == f"DSA{family.config}":
            return dsa_config_class(model_type)
        if name.startswith("DSA") and name == _decoder_name(model_type):
            return dsa_decoder_class(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _decoder_name(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return ATTACHABLE[model_type].saved_name(str(MODEL_MAPPING_NAMES[model_type]))


def _register_config(model_type: str, base: type[PreTrainedConfig], made: type[PreTrainedConfig]) -> None:
    """Registers a configuration class with `AutoConfig`, and its tokenizer with `AutoTokenizer`: the family's."""
    from transformers.models.auto import tokenization_auto
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(made.model_type, made, exist_ok=True)
    by_type, by_class = tokenization_auto.TOKENIZER_MAPPING_NAMES, tokenization_auto.TOKENIZER_MAPPING
    if model_type in by_type:
        by_type[made.model_type] = by_type[model_type]
    if base in by_class:
        by_class.register(made, by_class[base], exist_ok=True)
    if model_type in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(made.model_type)


def _register_model(model_type: str, made: type[PreTrainedModel]) -> None:
    """Registers a model class with `AutoModelForCausalLM`, and how transformers renames the family's weights."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    assert made.config_class is not None
    AutoModelForCausalLM.register(made.config_class, made, exist_ok=True)
    conversion = get_checkpoint_conversion_mapping(model_type)
    if conversion is not None:
        register_checkpoint_conversion_mapping(f"dsa_{model_type}", conversion, overwrite=True)


def become_savable(model: PreTrainedModel, config: DSAConfig) -> None:
    """Gives an attached causal language model the classes that save and load its indexers.

    Models that are not exactly the family's causal language model (a classifier, a user's subclass) keep their
    class: they run sparse, and their indexers are saved with `save_indexers`. Their `save_pretrained` says so.
    """
    family = family_of(model)
    known = family.model_type in ATTACHABLE
    if known and type(model) is family.model_class():
        model.__class__ = dsa_model_class(family.model_type)
        model.config.__class__ = dsa_config_class(family.model_type)
    if type(model) in _made_classes(family.model_type):
        model.config.dsa = config.to_dict()
        model.config.auto_map = {
            "AutoConfig": f"{STUB_MODULE}.{model.config.__class__.__name__}",
            "AutoModel": f"{STUB_MODULE}.{_decoder_name(family.model_type)}",
            "AutoModelForCausalLM": f"{STUB_MODULE}.{family.saved_class}",
        }
    else:
        vars(model)[_SAVE] = MethodType(_saving_dense(), model)


def _made_classes(model_type: str) -> tuple[type | None, ...]:
    """The classes with indexers that were made of a family so far."""
    return _model_classes.get(model_type), _decoder_classes.get(model_type)


def _saving_dense() -> Any:
    # Copied and pickled with the model, a method of the model is found again by this name.
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """The class's own, which then says what the folder is."""
        from dsa.models.packed import check_savable

        check_savable(self)
        saved = type(self).save_pretrained(self, *args, **kwargs)
        logger.warning(
            "dsa: %s was saved as a dense model: nothing will load its indexers from there, only the family's causal "
            "language model is saved with them. Save them with dsa.save_indexers(model, DIR); after from_pretrained, "
            "dsa.attach(model, indexers=DIR) makes it sparse again",
            type(self).__name__,
        )
        return saved

    return save_pretrained


def become_plain(model: PreTrainedModel) -> None:
    """The inverse of `become_savable`."""
    family = family_of(model)
    if type(model) not in _made_classes(family.model_type):
        from dsa.models.packed import remember

        vars(model).pop(_SAVE, None)
        remember(model)
        return
    model.__class__ = type(model).__bases__[0]
    model.config.__class__ = family.config_class()
    # A loaded configuration also has its type as an attribute of its own, which would hide the class's.
    for attribute in ("dsa", "dsa_trained", "auto_map", "model_type"):
        vars(model.config).pop(attribute, None)


def _stub(model_type: str) -> str:
    family: Family = ATTACHABLE[model_type]
    names = f"DSA{family.config}, {family.saved_class}, {_decoder_name(model_type)}"
    return (
        '"""Loads this model through the package dsa-attention, which must be installed."""\n\n'
        f"from dsa.models.saving import {names}  # noqa: F401\n"
    )
