"""Finding a model's configuration by what a user calls it: preset, file, directory, `default` or Hub id."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsa.config import DSAConfig
from dsa.cost.model_config import shape_from
from dsa.cost.presets import PRESETS, find_preset, nearest_presets
from dsa.cost.shape import ModelShape
from dsa.runs.json_files import parse_json, read_json

DEFAULT = "default"
DEFAULT_PRESET = "SmolLM2-135M"
"""Sizes of the embedded default model."""

CONFIG = "config.json"
INDEXERS = "indexers.safetensors"

SavedConfig = Callable[[str | Path], DSAConfig]
"""Reads the configuration of saved indexers: from a folder, or of the `"default"` ones."""


def read_model(name: str, saved_config: SavedConfig | None = None) -> tuple[ModelShape, DSAConfig | None]:
    """A model's sizes, and the DSA it comes with: trained into it, saved with it, or shipped for the default.

    Args:
        name: A preset of `dsa.cost.presets`, a `config.json`, a directory that holds one, `"default"`, or a Hub id,
            of which only the configuration is fetched.
        saved_config: Reads the configuration of indexers in the model's folder, and of those shipped for the default
            model; without it such a model counts as one without DSA.

    Raises:
        ValueError: No such preset, no readable configuration, or a field is missing; the message names it.
        OSError: No such file or directory, or the Hub cannot be asked.
    """
    if name == DEFAULT:
        return shape_from(PRESETS[DEFAULT_PRESET], DEFAULT), saved_config(DEFAULT) if saved_config else None
    path = Path(name).expanduser()
    preset = find_preset(name)
    if preset is not None and not path.exists():
        shape = shape_from(PRESETS[preset], preset)
        return shape, shape.trained_dsa
    if path.is_dir():
        shape, config = _read(_parse(path / CONFIG), name)
        if config is None and saved_config is not None and (path / INDEXERS).is_file():
            config = saved_config(path)
        return shape, config
    if path.is_file():
        return _read(_parse(path), name)
    if path.suffix == ".json" or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model: there is no file or directory {name}; expected a config.json or its directory")
    if "/" not in name:
        raise ValueError(
            f"model: there is no preset {name!r}; near it are {', '.join(nearest_presets(name))}. A directory with a "
            "config.json, `default` or a Hub id (owner/name) will do as well"
        )
    return _read(_fetch(name), name)


def _read(raw: Mapping[str, Any], name: str) -> tuple[ModelShape, DSAConfig | None]:
    """Sizes and DSA of one file; an attached model's has the latter under `dsa`."""
    shape, saved = shape_from(raw, name), raw.get("dsa")
    if saved is None:
        return shape, shape.trained_dsa
    return shape, parse_json(json.dumps(saved), DSAConfig, f"model {name}: the field dsa", "save the model again")


def _parse(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"model: {path.parent} has no {path.name}; expected what save_pretrained wrote")
    return read_json(path, dict[str, Any], f"model: {path}", "copy it again, or name a preset")


def _fetch(name: str) -> Mapping[str, Any]:
    """The raw configuration from the Hub or its local cache: `AutoConfig` would fill in what is missing."""
    from transformers import PreTrainedConfig

    from dsa.runs.quiet import quiet_transformers

    try:
        with quiet_transformers():
            raw, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        presets = ", ".join(PRESETS)
        raise OSError(
            f"model: {name} is no local directory, and the Hub has no configuration of it or cannot be reached; check "
            f"the spelling and the network, or name a preset: {presets}"
        ) from error
    if not raw:
        raise ValueError(f"model: {name} has no config.json on the Hub")
    return raw
