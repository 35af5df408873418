"""A GGUF file as a model: its blocks are the weights, as they are.

Names, configurations and tokenizers are transformers' business. Configuration and tokenizer are kept in the cache,
because transformers takes seconds to read them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from transformers import PreTrainedModel

from dsa.models.default_model import Status, cache_dir, quiet_tqdm
from dsa.models.gguf_file import Header, Tensor, read_header
from dsa.models.packed import empty_like, put, remember
from dsa.modules.packed_linear import PackedMatrix
from dsa.ops.packed_linear import FORMATS, pack_blocks
from dsa.runs.files import replace_folder

SUFFIX = ".gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2")
"""Those whose tensors transformers keeps as they are, permutes by rows, or only shifts where they are norms."""
LEFT_OUT = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that transformers has no place for: what they say of RoPE is in the metadata, too."""
SIZES = (
    *("embedding_length", "feed_forward_length", "vocab_size", "rope.dimension_count", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
)
"""Entries of the metadata, after the architecture's name, that no tensor would be smaller than."""
READING_VERSION = 1
"""Raised whenever what is kept of a file changes."""

_NAMES = {each.number: each for each in FORMATS.values()}


def is_gguf(name: str) -> bool:
    """Whether a name can only mean a GGUF file."""
    return name.lower().endswith(SUFFIX)


def checked_header(path: Path) -> Header:
    """The header of a file whose model can be made.

    Raises:
        ValueError: The file is damaged, or its architecture is not among `ARCHITECTURES`.
        OSError: It cannot be read.
    """
    header = read_header(path)
    if header.architecture not in ARCHITECTURES:
        raise ValueError(
            f"model: {path} has the architecture {header.architecture!r}, expected one of {', '.join(ARCHITECTURES)}; "
            "load its original checkpoint"
        )
    layers = header.scalars.get(f"{header.architecture}.block_count")
    if not isinstance(layers, int) or not 0 < layers <= len(header.tensors):
        raise ValueError(
            f"model: {path} has {len(header.tensors)} tensors and says that it has {layers} layers; it is damaged"
        )
    largest = max(size for tensor in header.tensors.values() for size in tensor.shape)
    for name, size in header.scalars.items():
        # Something is made of these sizes before tensors are compared with them.
        if name.removeprefix(f"{header.architecture}.") in SIZES and not (
            isinstance(size, int) and 0 < size <= largest
        ):
            raise ValueError(
                f"model: {name} in {path} is {size}, and its tensors have at most {largest} rows or columns"
            )
    return header


def settings_folder(path: Path, header: Header, status: Status | None = None) -> Path:
    """A folder with configuration and tokenizer of a file, made now if the cache has none of this header.

    Raises:
        ValueError: transformers cannot make them of the file.
        ImportError: What reads GGUF files is not installed.
        OSError: The cache cannot be written.
    """
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(header.nbytes)).hexdigest()
    folder = cache_dir() / "models" / f"gguf-{digest[:24]}-v{READING_VERSION}"
    if folder.is_dir():
        return folder
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"model: reading {path.name} needs {' and '.join(missing)}: pip install 'dsa-attention[gguf]'"
        )
    (status or (lambda message: None))(f"Reading configuration and tokenizer of {path.name}, once")

    def write(part: Path) -> None:
        for settings in _read_settings(path):
            settings.save_pretrained(part)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            replace_folder(folder, write, "DSA_CACHE")
    return folder


def _read_settings(path: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        with quiet_tqdm():
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError:
        raise
    except Exception as error:  # What a header makes transformers stumble over is not to be foreseen.
        raise ValueError(
            f"model: transformers cannot make a model of the metadata of {path} ({type(error).__name__}: {error})"
        ) from error
    return config, tokenizer


def read_model(path: Path, header: Header, config: Any) -> PreTrainedModel:
    """The model with the file's blocks, in memory.

    Blocks of a format without products are widened to fp32, and a warning says so.

    Args:
        path: The file.
        header: As `checked_header` returned it.
        config: The model's configuration.

    Raises:
        ValueError: The file lacks a tensor, has one too many, or one of another shape than its metadata say.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    named, process = _names(model, header, config)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    widened: set[str] = set()
    for tensor_name, tensor in header.tensors.items():
        name = named.get(tensor_name)
        if name is None:
            if tensor_name in LEFT_OUT:
                continue
            raise ValueError(
                f"model: {path} has the tensor {tensor_name}, which {type(model).__name__} has no place for"
            )
        wanted = tuple(model.get_parameter(name).shape)
        if tensor.shape != wanted:
            raise ValueError(
                f"model: {tensor_name} in {path} is {list(tensor.shape)}, and its metadata make it {list(wanted)}; "
                "the file is damaged"
            )
        _take(model, name, tensor, data[tensor.offset : tensor.offset + tensor.nbytes], process, tensor_name, widened)
    _tie(model)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"model: {path} lacks the tensor of {missing[0]} ({len(missing)} in all); the file is damaged")
    if widened:
        warnings.warn(
            f"{path.name} has blocks of {', '.join(sorted(widened))}, for which there are no products: they were "
            "widened to fp32",
            UserWarning,
            stacklevel=2,
        )
    remember(model)
    return model.eval()


def _names(model: PreTrainedModel, header: Header, config: Any) -> tuple[Mapping[str, str], Callable[..., Any]]:
    """By the file's names those of the model, and what transformers does to a tensor on its way."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    architecture = next(number for number, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    known = get_tensor_name_map(architecture, config.num_hidden_layers)
    named = {}
    for name, _ in model.named_parameters():
        layer, _, last = name.rpartition(".")
        if (theirs := known.get_name(layer)) is not None:
            named[f"{theirs}.{last}"] = name
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
    return named, processor.process


def _take(
    model: PreTrainedModel,
    name: str,
    tensor: Tensor,
    data: np.ndarray,
    process: Callable[..., Any],
    tensor_name: str,
    widened: set[str],
) -> None:
    """Puts one tensor into the model: as blocks where a layer multiplies with them, else as numbers."""
    import gguf

    place, _, last = name.rpartition(".")
    module, format = model.get_submodule(place), _NAMES.get(tensor.type)
    plain = type(module) in (nn.Linear, nn.Embedding) and last == "weight"
    kind = gguf.GGMLQuantizationType(tensor.type)
    if plain and format is not None and not (isinstance(module, nn.Embedding) and not _head_is_plain(model)):
        rows, columns = tensor.shape
        # Rows are permuted as bytes: a block lies within a row.
        moved = process(weights=data.reshape(rows, format.row_bytes(columns)), name=tensor_name).weights
        made = empty_like(module, format.name)
        made.fill(pack_blocks(torch.from_numpy(np.array(moved)), format, columns))
        put(model, place, made)
        return
    if kind.name not in ("F32", "F16", "BF16", "F64") and (plain or format is None):
        widened.add(kind.name)
    row = data.reshape(*tensor.shape[:-1], -1)
    numbers = gguf.dequantize(row, kind).reshape(tensor.shape).astype(np.float32)
    moved = process(weights=numbers, name=tensor_name).weights
    setattr(module, last, nn.Parameter(torch.from_numpy(np.array(moved, dtype=np.float32))))


def _head_is_plain(model: PreTrainedModel) -> bool:
    """Whether an embedding's blocks can be a tied head's, too."""
    return type(model.get_output_embeddings()) is nn.Linear or isinstance(model.get_output_embeddings(), PackedMatrix)


def _tie(model: PreTrainedModel) -> None:
    """A head that the file has no tensor for is the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_meta or not model.config.tie_word_embeddings:
        return
    if not isinstance(embedding, PackedMatrix):
        model.tie_weights()
        return
    name = next(name for name, module in model.named_modules() if module is head)
    put(model, name, empty_like(head, embedding.format, embedding))
