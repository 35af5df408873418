"""The tokenizer of a model that begins with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dsa.testing.scripts import load_script

SCRIPT = load_script(Path(__file__).parents[2] / "scripts" / "train_tokenizer.py")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("all work and no play makes for a dull day, and so it goes on and on. " * 40)
    return str(path)


def test_any_text_comes_back(text: str, tmp_path: Path) -> None:
    SCRIPT.train_tokenizer([text], 280).save_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 280
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, None)
    for sample in ("no play, no work", "Öl und\tZeilen\n\nfür 🦀"):
        ids = tokenizer(sample)["input_ids"]
        assert tokenizer.decode(ids) == sample
        assert 0 not in ids
    assert len(tokenizer("no play and no work")["input_ids"]) < len("no play and no work") / 2


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [(256, "vocabulary must be more than 256"), (5000, r"the text gives \d+ tokens, 5000 were asked for")],
)
def test_vocabularies_that_cannot_be(text: str, vocabulary: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCRIPT.train_tokenizer([text], vocabulary)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        SCRIPT.train_tokenizer([str(tmp_path / "gone.txt")], 300)
