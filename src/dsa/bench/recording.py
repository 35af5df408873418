"""The tensors of one layer of an attached model on real text: what the kernels meet in use.

The text is the Python language reference, continued from its beginning where it is too short. It is read in chunks
with the cache, and reading stops after the layer. The recording of the default model is kept in the cache directory.

Shapes: `n` tokens, `H`/`G` query / KV heads, `D` head dim, `Hi`/`Di` index heads / index head dim.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from dsa.bench.tensors import LayerTensors, Sizes
from dsa.models.attached import report_of
from dsa.models.checkpoint import SHIPPED
from dsa.models.context import AttentionCall, DSAContext
from dsa.models.default_model import DEFAULT_MODEL, Status, cache_dir, default_model_dir
from dsa.models.loading import LoadedModel, load_model
from dsa.models.rope import angles_for
from dsa.models.sparse import attach_indexers
from dsa.modules import memory
from dsa.ops import QuantizedKeys
from dsa.runs.files import write_tensors
from dsa.runs.inputs import CUT_MARGIN, Document, encode, read_document
from dsa.runs.progress import Progress

CHUNK = 4096
_CACHED = ("key", "value", "index_key", "index_key_scale")
_FIELDS = ("query", "key", "value", "index_query", "index_key", "index_key_scale", "index_weight")


@dataclass(frozen=True)
class Recording:
    """One layer's tensors, and what they came from."""

    tensors: LayerTensors
    sizes: Sizes
    source: str


class _Recorded(Exception):
    """Ends a forward after the layer that was recorded."""


def recording(model: str, tokens: int, *, top_k: int | None, status: Status, progress: Progress) -> Recording:
    """The recording of a middle layer, out of the cache directory where it is there.

    Args:
        model: As in `load_model`; only the default model's recording is kept.
        tokens: At least so many; what is kept may be longer.
        top_k: The budget in place of the configuration's; `None` keeps it.
        status: Told what takes long.
        progress: Shows the chunks.

    Raises:
        OSError: The model cannot be read.
        ValueError: The model cannot be attached, or has no sparse layer.
        ImportError: The default model is not installed.
    """
    file = _kept(tokens) if model == DEFAULT_MODEL else None
    if file is not None:
        status(f"Reading the recorded layer from {file}")
        found = _load(file)
    else:
        loaded = load_model(model, device="cpu", status=status)
        attach_indexers(loaded, None)
        found = record_layer(loaded, tokens, progress=progress)
        if model == DEFAULT_MODEL:
            _keep(found)
    if top_k is None:
        return found
    sizes = Sizes(**{**vars(found.sizes), "top_k": top_k, "local": min(found.sizes.local, top_k // 4)})
    return Recording(found.tensors, sizes, found.source)


def long_ids(tokenizer: Any, tokens: int) -> Tensor:
    """int64 `[1, tokens]` of the Python language reference, continued from its beginning where it ends."""
    document = read_document(None)
    # No tokenizer makes more tokens than UTF-8 has bytes; English text has about four bytes a token.
    repeats = 1
    while True:
        text = Document("\n\n".join([document.text] * repeats), document.name)
        try:
            return encode(text, tokenizer, tokens)
        except ValueError:
            if len(text.text.encode()) > 16 * (tokens + CUT_MARGIN):
                raise
            repeats *= 2


@torch.no_grad()
def record_layer(loaded: LoadedModel, tokens: int, *, progress: Progress, chunk: int = CHUNK) -> Recording:
    """Reads a text with an attached model, as far as its middle layer, and keeps what that layer's attention reads."""
    report = report_of(loaded.model)
    sparse = [row.layer for row in report.layers if row.kind == "sparse"]
    if not sparse:
        raise ValueError(f"model: {loaded.name} has no sparse layer to record")
    layer = min(sparse, key=lambda number: abs(number - len(report.layers) // 2))
    ids = long_ids(loaded.tokenizer, tokens)
    calls: list[AttentionCall] = []

    def observe(call: AttentionCall) -> None:
        if call.layer == layer:
            calls.append(call)
            raise _Recorded

    cache = DynamicCache(config=loaded.model.config)
    parts: dict[str, list[Tensor]] = {"query": [], "index_query": [], "index_weight": []}
    starts = range(0, tokens, chunk)
    with progress(f"Recording layer {layer} over {tokens:,} tokens", len(starts)) as advance:
        for start in starts:
            with contextlib.suppress(_Recorded), angles_for(loaded.model, tokens):
                loaded.model(
                    ids[:, start : start + chunk],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                    dsa_context=DSAContext(observer=observe),
                )
            call = calls.pop()
            for name, part in parts.items():
                part.append(getattr(call, name).clone())
            advance()
    assert isinstance(call.index_key, QuantizedKeys), "the shipped configuration keeps int8 index keys"
    whole = {name: torch.cat(part, dim=1) for name, part in parts.items()}
    tensors = LayerTensors(
        whole["query"],
        _cached(call.key),
        _cached(call.value),
        whole["index_query"],
        QuantizedKeys(_cached(call.index_key.data), _cached(call.index_key.scale)),
        whole["index_weight"],
    )
    config = report.config
    sizes = Sizes(
        heads=tensors.query.shape[2],
        kv_heads=tensors.key.shape[2],
        head_dim=tensors.query.shape[3],
        index_heads=tensors.index_query.shape[2],
        index_dim=tensors.index_query.shape[3],
        top_k=config.layer_top_k(layer),
        sinks=config.sinks,
        local=config.layer_local(layer),
    )
    return Recording(tensors, sizes, f"layer {layer} of {loaded.name} reading {read_document(None).name}")


def _cached(tensor: Tensor) -> Tensor:
    """A contiguous copy where an attached model's cache would have it."""
    return memory.empty(tensor.shape, tensor.dtype).copy_(tensor)


def _digest() -> str:
    """Of the default model and its indexers."""
    digest = hashlib.sha256(SHIPPED.read_bytes() if SHIPPED.exists() else b"")
    digest.update(default_model_dir().name.encode())
    return digest.hexdigest()[:16]


def _kept(tokens: int) -> Path | None:
    """A recording of at least so many tokens."""
    folder = cache_dir() / "bench"
    lengths = {int(path.stem.split("-")[1]): path for path in folder.glob(f"{_digest()}-*.safetensors")}
    enough = [length for length in lengths if length >= tokens]
    return lengths[min(enough)] if enough else None


def _keep(found: Recording) -> None:
    """Writes a recording, and removes shorter ones and those of other indexers."""
    folder = cache_dir() / "bench"
    tensors = found.tensors
    assert isinstance(tensors.index_key, QuantizedKeys)
    values = (
        tensors.query,
        tensors.key,
        tensors.value,
        tensors.index_query,
        tensors.index_key.data,
        tensors.index_key.scale,
        tensors.index_weight,
    )
    sizes = {name: str(value) for name, value in vars(found.sizes).items()}
    file = folder / f"{_digest()}-{tensors.query.shape[1]}.safetensors"
    kept = {name: value.contiguous() for name, value in zip(_FIELDS, values, strict=True)}
    write_tensors(file, kept, {**sizes, "source": found.source})
    for other in folder.glob("*.safetensors"):
        if other != file:
            other.unlink()


def _load(file: Path) -> Recording:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        notes = opened.metadata()
    # Copied: pages of a mapped file would be read from disk while something is timed.
    read = {name: _cached(part) if name in _CACHED else part.clone() for name, part in load_file(file).items()}
    keys = QuantizedKeys(read.pop("index_key"), read.pop("index_key_scale"))
    sizes = Sizes(**{name: int(value) for name, value in notes.items() if name != "source"})
    return Recording(LayerTensors(index_key=keys, **read), sizes, notes["source"])
