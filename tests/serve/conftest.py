"""A tiny model that is served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dsa
from dsa.models.loading import LoadedModel
from dsa.serve.engine import Engine
from dsa.store import ModelStore, Store
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def served() -> LoadedModel:
    # fp64: chunks of different sizes must not differ by rounding.
    model: Any = tiny_model("llama", vocab_size=BYTE_VOCABULARY, max_position_embeddings=4096).double()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        # It writes bytes that are characters by themselves.
        bytes_of = {text: number for number, text in enumerate(tiny_tokenizer().convert_ids_to_tokens(range(259)))}
        readable = {number for text, number in bytes_of.items() if len(text) == 1 and text.isascii()}
        model.lm_head.weight[[number for number in range(BYTE_VOCABULARY) if number not in readable]] = 0.0
    dsa.attach(model, TINY_CONFIG)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return LoadedModel(model, tokenizer, "tiny", False)


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    return served()


@pytest.fixture
def store(loaded: LoadedModel, tmp_path: Path) -> ModelStore:
    return ModelStore(Store(tmp_path / "store"), loaded.model, "tiny")


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[Callable[..., Engine]]:
    """Starts engines, and closes them."""
    started: list[Engine] = []

    def start(**options: Any) -> Engine:
        started.append(Engine(loaded, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()
