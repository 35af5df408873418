"""Tiny models of every kind of cache, with a document to read and a store to keep it in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dsa
from dsa.generation.session import Session
from dsa.store import ModelStore, Store
from dsa.store.entry import Entry
from dsa.testing.born_with_dsa import born_model
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens

DOCUMENT = tiny_tokens(1, 90)[0].tolist()
QUESTION = tiny_tokens(1, 9, seed=3)[0].tolist()
NEW = 6


def attached(family: str = "llama", kv_dtype: str | None = None, **changes: Any) -> Any:
    """A model with fresh indexers that writes on and on."""
    # fp64: runs of different batch shapes must not differ by rounding.
    model = tiny_model(family, **changes).double()
    model.generation_config.eos_token_id = None
    dsa.attach(model, TINY_CONFIG, kv_dtype=kv_dtype)
    return model


def accelerated(cache: str) -> Any:
    """A model born with DSA."""
    model = born_model("deepseek_v32")
    model.generation_config.eos_token_id = None
    dsa.accelerate(model, cache=cache)
    return model


MODELS = {
    "llama": lambda: attached(),
    "int8 index keys": lambda: attached("qwen3"),
    "narrower": lambda: attached(kv_dtype="fp16"),
    "windows": lambda: attached("gemma3_text"),
    "windows and sinks": lambda: attached("gpt_oss"),
    "latent": lambda: attached("deepseek_v3"),
    "born": lambda: accelerated("full"),
    "fp8 rows": lambda: accelerated("fp8"),
}


def session(model: Any, folder: Path, chunk: int = 32) -> Session:
    """A session that keeps what it reads in this folder, however short."""
    return Session(model, chunk=chunk, store=ModelStore(Store(folder), model, "tiny", least=16), document="text")


def only_entry(folder: Path) -> Entry:
    """The only entry of a store."""
    [entry] = Store(folder).entries()
    return entry


def flip(file: Path, place: int) -> None:
    """Changes one bit of a file."""
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)
        opened.seek(place)
        opened.write(bytes([byte[0] ^ 4]))
