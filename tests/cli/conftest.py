"""A tiny Llama that reads bytes, on disk, and the command in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from dsa.cli.main import app
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

TEXT = "What is kept of a long text, when every word may look back at a few others only? " * 4


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a model and a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama", vocab_size=BYTE_VOCABULARY).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text file of 324 bytes."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture
def dsa(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Runs the command with these arguments; `stdout` and `stderr` are told apart."""
    monkeypatch.delenv("DSA_DEBUG", raising=False)
    monkeypatch.setenv("DSA_STORE", str(tmp_path / "dsa-store"))
    threads = torch.get_num_threads()

    def run(*arguments: str, stdin: str | None = None) -> Result:
        try:
            return CliRunner().invoke(app, list(arguments), input=stdin)
        finally:
            torch.set_num_threads(threads)

    return run
