"""A tiny Llama that reads bytes, and a text for it."""

import pytest

from dsa.models.loading import LoadedModel
from dsa.runs.inputs import Document
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

TEXT = "What is kept of a long text, when every word may look back at a few others only? " * 4


@pytest.fixture
def tiny() -> LoadedModel:
    return LoadedModel(tiny_model("llama", vocab_size=BYTE_VOCABULARY), tiny_tokenizer(), "tiny", False)


@pytest.fixture
def document() -> Document:
    return Document(TEXT, "a text")
