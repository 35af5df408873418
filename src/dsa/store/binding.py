"""What binds a stored document to its use: everything that decides which numbers a token's rows are.

A stored document opens only for a model whose binding is the same in every field. Numbers that differ by nothing but
the order of additions (threads, chunks, instruction sets) are the same here, as they are to one process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsa.models.acceleration import cache_of
from dsa.models.sparse import sparse_report_of

ARITHMETIC = 1
"""Raised whenever this library computes other rows from the same weights and tokens."""

SAMPLES = 1024
"""Numbers of each weight that are hashed in order, next to the sum over all of them."""

IRRELEVANT = {
    # What names a model or chooses tokens, and what only training or the host program looks at.
    *("_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label"),
    *("initializer_range", "is_decoder", "label2id", "output_attentions"),
    *("output_hidden_states", "pad_token_id", "problem_type", "return_dict", "sep_token_id", "tie_word_embeddings"),
    *("transformers_version", "use_cache", "dsa", "dsa_config", "auto_map", "model_type", "quantization_config"),
    *("torch_dtype", "attn_implementation", "_attn_implementation"),
}
"""Fields of a model's configuration that change no row. Every other one counts, known or not."""


@dataclass(frozen=True)
class Binding:
    """Plain JSON values by name."""

    fields: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(self.fields, sort_keys=True)

    def differences(self, other: Binding) -> list[str]:
        """Names of the fields in which two bindings differ."""
        names = sorted({*self.fields, *other.fields})
        missing = object()
        return [name for name in names if self.fields.get(name, missing) != other.fields.get(name, missing)]


def binding_of(model: Any) -> Binding:
    """The binding of an attached or accelerated model as it is now. Reads every weight once.

    Raises:
        ValueError: The model is neither.
    """
    config = sparse_report_of(model).config
    weights, indexers = _fingerprints(model)
    fields: dict[str, Any] = {
        "arithmetic": ARITHMETIC,
        "weights": weights,
        "indexers": indexers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "cache": cache_of(model),
        "model_type": model.config.model_type.removeprefix("dsa_"),
    }
    text = model.config.get_text_config(decoder=True)
    given = {name: value for name, value in text.to_dict().items() if name not in IRRELEVANT}
    fields |= {f"config.{name}": value for name, value in given.items()}
    # Without the shortcut the same tokens are read by another path.
    fields |= {f"dsa.{name}": value for name, value in config.to_dict().items() if name != "dense_shortcut"}
    return Binding(json.loads(json.dumps(fields, default=str)))


def _fingerprints(model: Any) -> tuple[str, str]:
    """Of the base weights and of the indexers: names, dtypes, sizes and numbers."""
    digests = hashlib.sha256(), hashlib.sha256()
    seen: set[tuple[int, torch.Size]] = set()
    for name, value in sorted(model.state_dict().items()):
        is_indexer = ".indexer." in name
        if not isinstance(value, torch.Tensor):
            digests[is_indexer].update(f"{name} {value!r}".encode())
            continue
        # Tied weights are read once.
        if (value.data_ptr(), value.shape) in seen and value.numel():
            continue
        seen.add((value.data_ptr(), value.shape))
        digests[is_indexer].update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digests[is_indexer].update(_content(value.detach()))
    return digests[0].hexdigest()[:32], digests[1].hexdigest()[:32]


def _content(weight: torch.Tensor) -> bytes:
    """The sum over all words of a weight, which any changed number changes, and evenly spaced words in order."""
    flat = weight.contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    # Not every offset in memory is one of a whole word.
    words = flat[:whole].view(torch.int64) if flat.data_ptr() % 8 == 0 else flat[:whole].clone().view(torch.int64)
    total = int(words.sum()) + int(flat[whole:].sum()) if whole else int(flat.sum())
    step = max(1, words.numel() // SAMPLES)
    return str(total).encode() + words[::step].cpu().numpy().tobytes() + flat[whole:].cpu().numpy().tobytes()
