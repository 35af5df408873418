"""What tells one base model from another: its sizes, and a few of its weights.

Names change when a model is copied and dtypes when it is converted or packed; a sample of the weights that its layers
compute with, compared with a tolerance, survives all of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dsa.models.decoder import decoder_of
from dsa.models.rope import scaling_of
from dsa.models.weights import Matrix, entries, is_plain, matrices

SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")

_SAMPLES = 64
_SAME_MODEL = 0.05
"""Relative distance of sampled base weights up to which two models are taken to be the same.

Rounding to bf16 is near 0.002 and light fine-tuning stays well below; another training run is near 1.4.
"""
_SAME_PACKED_MODEL = 0.3
"""The same where the weights of one are packed: rounding to 4 bits is near 0.1."""


def describe_base_model(model: PreTrainedModel) -> dict[str, Any]:
    """What identifies a base model: its sizes, its name, and a sample of its weights, as plain JSON."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    sampled = _sampled(model)
    return {
        "model_type": config.model_type.removeprefix("dsa_"),
        "name": Path(str(config.name_or_path)).name,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "rope_scaling": scaling_of(config),
        "sample": [round(x, 6) for matrix in sampled for x in _spread(matrix, _SAMPLES // 2)],
        **({} if all(is_plain(matrix) or _is_offloaded(matrix) for matrix in sampled) else {"packed": True}),
    }


def distance(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """How far the sampled weights of two descriptions are apart, relative to the second's."""
    a, b = torch.tensor(ours.get("sample", [])), torch.tensor(theirs.get("sample", []))
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def is_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two descriptions of equal sizes are of one model, as far as rounding and light fine-tuning go."""
    packed = ours.get("packed") or theirs.get("packed")
    return distance(ours, theirs) <= (_SAME_PACKED_MODEL if packed else _SAME_MODEL)


def _sampled(model: PreTrainedModel) -> tuple[Matrix, Matrix]:
    """The embeddings, and the matrix in the middle of the decoder."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    first, others = None, []
    for matrix in matrices(decoder_of(model)):
        if matrix.module is embeddings:
            first = matrix
        else:
            others.append(matrix)
    if first is None:
        first = Matrix(embeddings, "weight", (model.config.vocab_size, model.config.hidden_size))
    return first, others[len(others) // 2]


def _is_offloaded(matrix: Matrix) -> bool:
    weight = getattr(matrix.module, matrix.name, None)
    return isinstance(weight, torch.Tensor) and weight.is_meta


def _spread(matrix: Matrix, count: int) -> list[float]:
    """Evenly spaced entries."""
    rows, columns = matrix.shape
    positions = torch.arange(count) * (rows * columns - 1) // (count - 1)
    return entries(matrix, positions // columns, positions % columns).tolist()
