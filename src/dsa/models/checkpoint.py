"""The indexers' own file: one safetensors with a format version, the config and what identifies the base model.

Weights are named `layers.<layer>.<parameter of Indexer>`.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from typing_extensions import TypedDict

from dsa.config import DSAConfig
from dsa.models.attached import config_of, indexers_of, report_of, set_trained
from dsa.models.families import full_attention_layers
from dsa.models.fingerprint import SIZES, describe_base_model, distance, is_same
from dsa.models.rope import RopeScaling
from dsa.models.rope import describe as describe_scaling
from dsa.models.tensors import FLOATS
from dsa.runs.files import write_tensors
from dsa.runs.json_files import Size, parse_json

logger = logging.getLogger("dsa")

FORMAT = "dsa-indexers"
VERSION = 1
FILE_NAME = "indexers.safetensors"
SHIPPED = Path(__file__).parent / "shipped" / FILE_NAME


_NAME = re.compile(r"layers\.(\d{1,6})\.(.+)")
_REMEDY = "copy it again, or train new ones"


class BaseModel(TypedDict):
    """What `describe_base_model` says, as a file has it."""

    model_type: str
    name: NotRequired[str]
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    rope_scaling: NotRequired[dict[str, Any] | None]
    packed: NotRequired[bool]
    sample: list[float]


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
            for field in ("config", "base_model"):
                if field not in metadata:
                    raise ValueError(f"indexers: {file} lacks {field}; {_REMEDY}")
            config = parse_json(metadata["config"], DSAConfig, f"indexers: config of {file}", _REMEDY)
            if config.index_rope_dim is None:
                # The first files left it open, and all dims were meant; what `None` means may change.
                config = config.replace(index_rope_dim=config.index_head_dim)
            base_model = dict(parse_json(metadata["base_model"], BaseModel, f"indexers: base_model of {file}", _REMEDY))
            # Files without the field are from before it, when only training was meant to write them.
            trained = parse_json(metadata.get("trained", "true"), bool, f"indexers: trained of {file}", _REMEDY)
            _check_shapes(file, opened, config, base_model)
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"indexers: {file} is truncated or corrupt ({error}); {_REMEDY}") from error
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
    for name in ("index_heads", "index_head_dim", "rope_dim", "selections"):
        have = getattr(stored.config, name)
        # Indexers of one selection serve each of several.
        if getattr(config, name) != have and (name, have) != ("selections", 1):
            raise ValueError(
                f"indexers: {stored.path} has {name}={have}, but the config asks for "
                f"{getattr(config, name)}; leave {name} out to take the file's"
            )
    stored_layers = {int(name.split(".")[1]) for name in stored.weights}
    want = {layer for layer in range(theirs["num_hidden_layers"]) if config.has_indexer(layer)}
    missing = sorted(want & set(_full_layers(model)) - stored_layers)
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
            indexer.fill(weights)
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


def _check_shapes(file: Path, opened: Any, config: DSAConfig, base_model: dict[str, Any]) -> None:
    """Compares the tensors with the configuration by the file's header, before any is read or made."""
    queries, dim, hidden = config.index_heads * config.index_head_dim, config.index_head_dim, base_model["hidden_size"]
    latent = any(name.endswith(".wq_b.weight") for name in opened.keys())  # noqa: SIM118
    groups = 1 if latent else base_model["num_key_value_heads"]
    # The queries of latent attention come from its latent, whose size the file does not say.
    wanted = {
        "wq.weight": [queries, hidden],
        "wq_b.weight": [queries, None],
        "wk.weight": [dim, hidden],
        "k_norm.weight": [dim],
        "k_norm.bias": [dim],
    }
    names = {*wanted, "weights_proj.weight"}
    parts: dict[int, set[str]] = {}
    for name in opened.keys():  # noqa: SIM118
        tensor, found = opened.get_slice(name), _NAME.fullmatch(name)
        if found is None or int(found[1]) >= base_model["num_hidden_layers"] or found[2] not in names:
            raise ValueError(f"indexers: {file} has {name}, which is no weight of an indexer; {_REMEDY}")
        try:
            rows = config.index_heads * config.layer_selections(int(found[1]), groups)
        except ValueError as error:
            raise ValueError(f"indexers: {file}: {error}") from error
        shape = tensor.get_shape()
        # Head weights of one selection serve each of several, and multi-query attention has one KV head.
        rows = config.index_heads if shape[:1] == [config.index_heads] else rows
        expected = wanted.get(found[2], [rows, hidden])
        if len(shape) != len(expected) or any(b not in (None, a) for a, b in zip(shape, expected)):
            raise ValueError(
                f"indexers: {name} in {file} is {shape}, but its index_heads={config.index_heads}, "
                f"index_head_dim={dim} and hidden_size={hidden} make it {expected}; {_REMEDY}"
            )
        if tensor.get_dtype() not in FLOATS:
            raise ValueError(
                f"indexers: {name} in {file} is stored as {tensor.get_dtype()}, expected one of {', '.join(FLOATS)}; "
                f"{_REMEDY}"
            )
        parts.setdefault(int(found[1]), set()).add(found[2])
    for layer, have in parts.items():
        missing = names - have - {"wq_b.weight" if "wq.weight" in have else "wq.weight"}
        if missing:
            raise ValueError(f"indexers: layers.{layer}.{min(missing)} is missing in {file}; {_REMEDY}")


def _indexer_file(path: Path) -> Path:
    if path.is_dir() or not path.suffix:
        return path / FILE_NAME
    if path.suffix != ".safetensors":
        raise ValueError(f"indexers: only .safetensors files are read and written, got {path.name}")
    return path
