"""A document that was read is opened, and what is written after it is what reading it again gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import dsa
from dsa.generation.session import Session
from dsa.store import ModelStore, Store
from dsa.testing.born_with_dsa import born_model
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens

DOCUMENT = tiny_tokens(1, 90)[0].tolist()
QUESTION = tiny_tokens(1, 9, seed=3)[0].tolist()
NEW = 6


def attached(family: str = "llama", **changes: Any) -> Any:
    # fp64: runs of different batch shapes must not differ by rounding.
    model = tiny_model(family, **changes).double()
    model.generation_config.eos_token_id = None
    dsa.attach(model, TINY_CONFIG)
    return model


def accelerated(cache: str) -> Any:
    model = born_model("deepseek_v32")
    model.generation_config.eos_token_id = None
    dsa.accelerate(model, cache=cache)
    return model


MODELS = {
    "llama": lambda: attached(),
    "int8 index keys": lambda: attached("qwen3"),
    "windows": lambda: attached("gemma3_text"),
    "windows and sinks": lambda: attached("gpt_oss"),
    "latent": lambda: attached("deepseek_v3"),
    "born": lambda: accelerated("full"),
    "fp8 rows": lambda: accelerated("fp8"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def session(model: Any, folder: Path, chunk: int = 32) -> Session:
    return Session(model, chunk=chunk, store=ModelStore(Store(folder), model, "tiny", least=16), document="text")


def answer(session: Session, prompt: list[int], keep: int | None = None) -> list[int]:
    session.read(prompt, new_tokens=NEW, keep=keep)
    written = list(session.write(NEW))
    session.close()
    return written


def test_a_document_is_read_once(model: Any, tmp_path: Path) -> None:
    prompt = [*DOCUMENT, *QUESTION]
    expected = answer(Session(model, chunk=32), prompt)
    first = session(model, tmp_path / "store")
    assert answer(first, prompt, keep=len(DOCUMENT)) == expected
    assert first.timings.opened == 0
    assert first.kept is not None
    assert first.kept.tokens == len(DOCUMENT)
    for question in (QUESTION, QUESTION[:3], tiny_tokens(1, 40, seed=8)[0].tolist()):
        other = session(model, tmp_path / "store")
        asked = [*DOCUMENT, *question]
        assert answer(other, asked, keep=len(DOCUMENT)) == answer(Session(model, chunk=32), asked)
        assert other.timings.opened == len(DOCUMENT)
        assert other.timings.read == len(question)
        assert other.kept is None
    [entry] = Store(tmp_path / "store").entries()
    assert Store(tmp_path / "store").verify(entry) == ""
    with safe_open(entry.rows, "pt") as file:
        assert file.get_slice("token_ids")[0, : entry.state.tokens].tolist() == DOCUMENT
