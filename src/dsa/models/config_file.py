"""The JSON files of a model's folder, looked at before transformers reads them and makes what they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from dsa.config import DSAConfig
from dsa.runs.json_files import Size, read_json

REMEDY = "copy or download the model again, or correct the file"
MOST_LAYERS = 10_000

_Dimension = Annotated[int, Field(ge=1, le=1 << 26)]


class _Config(TypedDict, total=False):
    """What every configuration that names it must have of these; transformers looks at the rest."""

    model_type: str
    architectures: list[str] | None
    hidden_size: _Dimension
    n_embd: _Dimension
    vocab_size: _Dimension
    num_hidden_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    n_layer: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    num_attention_heads: _Dimension
    n_head: _Dimension
    head_dim: _Dimension | None
    max_position_embeddings: Size | None
    text_config: dict[str, Any]
    dsa: DSAConfig
    dsa_trained: bool


class _GenerationConfig(TypedDict, total=False):
    """The numbers of `generation_config.json` that are used before transformers looks at them."""

    bos_token_id: int | list[int] | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | list[int] | None


class _TokenizerConfig(TypedDict, total=False):
    """The same of `tokenizer_config.json`."""

    model_max_length: int | float | None


_OTHERS: dict[str, Any] = {
    "generation_config.json": _GenerationConfig,
    "tokenizer_config.json": _TokenizerConfig,
    "tokenizer.json": dict[str, Any],
    "special_tokens_map.json": dict[str, Any],
    "added_tokens.json": dict[str, Any],
    "model.safetensors.index.json": dict[str, Any],
}


def check_json_files(folder: Path) -> None:
    """Reads the JSON files of a model's folder.

    Raises:
        ValueError: One is no JSON object, too large or nested too deeply, or a size in `config.json` is none.
        OSError: One cannot be read.
    """
    read_json(folder / "config.json", _Config, f"model: {folder / 'config.json'}", REMEDY)
    for name, expected in _OTHERS.items():
        file = folder / name
        if file.is_file():
            read_json(file, expected, f"model: {file}", REMEDY)
