"""The indexers' own file: one safetensors with a format version, the config and what identifies the base model.

Weights are named `layers.<layer>.<parameter of Indexer>`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from dsa.config import DSAConfig
from dsa.models.attached import config_of, indexers_of, report_of, set_trained
from dsa.models.families import full_attention_layers
from dsa.models.fingerprint import SIZES, describe_base_model, distance, is_same
from dsa.models.rope import RopeScaling
from dsa.models.rope import describe as describe_scaling
from dsa.runs.files import write_tensors

logger = logging.getLogger("dsa")

FORMAT = "dsa-indexers"
VERSION = 1
FILE_NAME = "indexers.safetensors"
SHIPPED = Path(__file__).parent / "shipped" / FILE_NAME


@dataclass(frozen=True)
class StoredIndexers:
    """What an indexer file holds.

    Args:
        path: The file.
        config: What a model is attached with.
        base_model: What `describe_base_model` said of the model.
        weights: By name.
        trained: Whether training wrote them, and not only `save_indexers`.
    """

    path: Path
    config: DSAConfig
    base_model: dict[str, Any]
    weights: dict[str, torch.Tensor]
    trained: bool


def save_indexers(
    model: PreTrainedModel,
    path: str | Path,
    dtype: torch.dtype | None = None,
    base_model: dict[str, Any] | None = None,
    trained: bool | None = None,
) -> Path:
    """Writes the indexers of an attached model, whole or not at all.

    Args:
        model: An attached model.
        path: The file, or a folder that gets `indexers.safetensors`.
        dtype: Storage of the weights; as they are by default.
        base_model: What `describe_base_model` returned, where this process alone cannot call it now.
        trained: Whether the weights are trained ones, for training loops of your own; `None` takes what the model's
            report says, which `dsa train` and loading keep right.

    Returns:
        The file.

    Raises:
        ValueError: The model is not attached, or the file would not be safetensors.
        OSError: It cannot be written; what was there before is still there.
    """
    config = config_of(model)
    file = _indexer_file(Path(path))
    weights = {
        f"layers.{layer}.{name}": parameter.detach().to("cpu", dtype or parameter.dtype).contiguous()
        for layer, indexer in indexers_of(model).items()
        for name, parameter in indexer.state_dict().items()
    }
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": json.dumps(config.replace(index_rope_dim=config.rope_dim).to_dict()),
        "base_model": json.dumps(describe_base_model(model) if base_model is None else base_model),
        "trained": json.dumps(report_of(model).trained if trained is None else trained),
    }
    write_tensors(file, weights, metadata)
    return file


def read_indexers(source: str | Path) -> StoredIndexers:
    """Reads an indexer file without looking at a model.

    Args:
        source: The file, the folder it is in, or `"default"`.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: Not an indexer file, of a newer version, truncated or corrupt. Only safetensors are read.
    """
    file = SHIPPED if source == "default" else _indexer_file(Path(source))
    if not file.is_file():
        raise FileNotFoundError(f"indexers: no file at {file}; `dsa train MODEL --out DIR` writes one")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            _check_format(file, metadata)
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        config = DSAConfig.from_dict(_with_rope_dim(json.loads(metadata["config"])))
        base_model = json.loads(metadata["base_model"])
        # Files without the field are from before it, when only training was meant to write them.
        trained = json.loads(metadata.get("trained", "true"))
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"indexers: {file} is truncated or corrupt ({error}); copy it again, or train new ones"
        ) from error
    return StoredIndexers(file, config, base_model, weights, trained)


def check_indexers(stored: StoredIndexers, model: PreTrainedModel, config: DSAConfig) -> None:
    """Refuses indexers that do not belong to a model or do not fit a config.

    Raises:
        ValueError: Names what differs.
    """
    ours, theirs = describe_base_model(model), stored.base_model
    for key in SIZES:
        if ours[key] != theirs.get(key):
            raise ValueError(
                f"indexers: {stored.path} was trained for another model: its {key} is {theirs.get(key)!r}, "
                f"that of {type(model).__name__} is {ours[key]!r}; train indexers for this model"
            )
    if not is_same(ours, theirs):
        raise ValueError(
            f"indexers: {stored.path} was trained for another model of the same size "
            f"({theirs.get('name') or 'unnamed'}): sampled base weights differ by {distance(ours, theirs):.0%}; "
            "train indexers for this model"
        )
    _check_scaling(stored, ours["rope_scaling"])
    for name in ("index_heads", "index_head_dim", "rope_dim"):
        if getattr(config, name) != getattr(stored.config, name):
            raise ValueError(
                f"indexers: {stored.path} has {name}={getattr(stored.config, name)}, but the config asks for "
                f"{getattr(config, name)}; leave {name} out to take the file's"
            )
    have = {int(name.split(".")[1]) for name in stored.weights}
    want = {layer for layer in range(theirs["num_hidden_layers"]) if config.has_indexer(layer)}
    missing = sorted(want & set(_full_layers(model)) - have)
    if missing:
        raise ValueError(
            f"indexers: {stored.path} has none for layer {missing[0]}, which the config makes sparse; "
            "leave the layer dense, or train it"
        )


def _check_scaling(stored: StoredIndexers, ours: RopeScaling | None) -> None:
    """Indexers follow the model's angles: those trained with scaled RoPE are refused without it."""
    theirs = stored.base_model.get("rope_scaling")
    if theirs == ours:
        return
    if theirs is not None:
        raise ValueError(
            f"indexers: {stored.path} was trained with {describe_scaling(theirs)}, the model has "
            f"{describe_scaling(ours)}; load the model with rope_scaling={json.dumps(theirs)}"
        )
    if "rope_scaling" in stored.base_model or stored.path == SHIPPED:
        logger.warning(
            "dsa: %s was trained with plain RoPE, the model has %s: the indexers are extrapolated too",
            stored.path.name,
            describe_scaling(ours),
        )


def fill_indexers(model: PreTrainedModel, stored: StoredIndexers) -> None:
    """Copies stored weights into the indexers of an attached model; those of layers without one are left out.

    Raises:
        ValueError: A weight is missing or has another shape.
    """
    for layer, indexer in indexers_of(model).items():
        prefix = f"layers.{layer}."
        weights = {k.removeprefix(prefix): v for k, v in stored.weights.items() if k.startswith(prefix)}
        try:
            indexer.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"indexers: {stored.path} does not fit layer {layer}: {error}") from error


def load_indexers(model: PreTrainedModel, source: str | Path) -> None:
    """Puts stored weights into a model that is attached already, after the checks of `attach`."""
    stored = read_indexers(source)
    check_indexers(stored, model, config_of(model))
    fill_indexers(model, stored)
    set_trained(model, stored.trained)


def _full_layers(model: PreTrainedModel) -> list[int]:
    return [layer for layer, full in enumerate(full_attention_layers(model.config)) if full]


def _check_format(file: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"indexers: {file} is not an indexer file (its format is {metadata.get('format')!r}, not {FORMAT!r})"
        )
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"indexers: {file} has format version {metadata.get('version')}, this dsa reads version {VERSION}; "
            "update dsa, or train new ones"
        )


def _with_rope_dim(config: dict[str, Any]) -> dict[str, Any]:
    """The first files left `index_rope_dim` open, and all dims were meant; what `None` means may change."""
    if config.get("index_rope_dim") is None and "index_head_dim" in config:
        return {**config, "index_rope_dim": config["index_head_dim"]}
    return config


def _indexer_file(path: Path) -> Path:
    if path.is_dir() or not path.suffix:
        return path / FILE_NAME
    if path.suffix != ".safetensors":
        raise ValueError(f"indexers: only .safetensors files are read and written, got {path.name}")
    return path
