"""Finding a model's configuration by what a user calls it: preset, file, directory, `default` or Hub id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsa.config import DSAConfig
from dsa.cost.presets import PRESETS, find_preset, nearest_presets
from dsa.cost.reading import shape_from
from dsa.cost.shape import ModelShape

DEFAULT = "default"
DEFAULT_PRESET = "SmolLM2-135M"
"""Sizes of the embedded default model."""

CONFIG = "config.json"
INDEXERS = "indexers.safetensors"


def read_model(name: str) -> tuple[ModelShape, DSAConfig | None]:
    """A model's sizes, and the DSA it comes with: trained into it, saved beside it, or shipped for the default.

    Args:
        name: A preset of `dsa.cost.presets`, a `config.json`, a directory that holds one, `"default"`, or a Hub id,
            of which only the configuration is fetched.

    Raises:
        ValueError: No such preset, no readable configuration, or a field is missing; the message names it.
        OSError: No such file or directory, or the Hub cannot be asked.
    """
    if name == DEFAULT:
        return shape_from(PRESETS[DEFAULT_PRESET], DEFAULT), _saved(DEFAULT)
    path = Path(name).expanduser()
    preset = find_preset(name)
    if preset is not None and not path.exists():
        shape = shape_from(PRESETS[preset], preset)
        return shape, shape.native
    if path.is_dir():
        shape, config = _read(_parse(path / CONFIG), name)
        return shape, config or (_saved(path) if (path / INDEXERS).is_file() else None)
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


def saved_config(indexers: str | Path) -> DSAConfig:
    """The configuration in a file of indexers, as `dsa.attach` takes it.

    Raises:
        ValueError: Not an indexer file, truncated or corrupt.
        OSError: Nothing is there.
    """
    return _saved(indexers)


def _read(raw: Mapping[str, Any], name: str) -> tuple[ModelShape, DSAConfig | None]:
    """Sizes and DSA of one file; an attached model's has the latter under `dsa`."""
    shape, saved = shape_from(raw, name), raw.get("dsa")
    if saved is None:
        return shape, shape.native
    if not isinstance(saved, Mapping):
        raise ValueError(f"model {name}: the field 'dsa' must be what dsa.attach wrote, got {saved!r}")
    return shape, DSAConfig.from_dict(saved)


def _saved(source: str | Path) -> DSAConfig:
    from dsa.models.checkpoint import read_indexers

    return read_indexers(source).config


def _parse(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"model: {path.parent} has no {path.name}; expected what save_pretrained wrote")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"model: {path} is no text ({error.reason}); expected a model's config.json") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"model: {path} is no valid JSON (line {error.lineno}: {error.msg}); copy it again, or name a preset"
        ) from error
    if not isinstance(raw, dict):
        raise ValueError(f"model: {path} holds a {type(raw).__name__}, expected an object: a model's config.json")
    return raw


def _fetch(name: str) -> Mapping[str, Any]:
    """The raw configuration from the Hub or its local cache: `AutoConfig` would fill in what is missing."""
    from transformers import PreTrainedConfig

    from dsa.models.quiet import quiet_transformers

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
