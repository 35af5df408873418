"""A tiny Llama of four layers that reads bytes, with indexers that count as trained, and two texts."""

from pathlib import Path

import pytest
import torch

import dsa
from dsa.models.loading import LoadedModel
from dsa.runs.inputs import Document
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

CONFIG = dsa.DSAConfig(top_k=16, index_heads=2, index_head_dim=8, sinks=1, local=2)
SENTENCE = "What is kept of a long text, when every word may look back at a few others only? "


def loaded_model() -> LoadedModel:
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY, num_hidden_layers=4)
    return LoadedModel(model, tiny_tokenizer(), "tiny", False)


@pytest.fixture
def tiny() -> LoadedModel:
    return loaded_model()


@pytest.fixture(scope="session")
def indexers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = loaded_model().model
    torch.manual_seed(0)
    dsa.attach(model, CONFIG)
    return dsa.save_indexers(model, tmp_path_factory.mktemp("indexers"), trained=True)


@pytest.fixture
def texts() -> list[Document]:
    return [Document(SENTENCE * 3, "a text"), Document("On the other hand, " * 9, "another text")]
