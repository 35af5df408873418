"""`dsa eval --tasks` from the command line: what it prints and writes, and how mistakes end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import Result

import dsa as library
from dsa.eval.comparison import READERS
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY

Run = Callable[..., Result]

ALL = "perplexity,mass,needles,agreement"
TEXT = "It was a quiet day, and nothing much went on anywhere. Nobody minded that at all! " * 30


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> str:
    """A directory with an attached model of three layers that reads 4,096 bytes."""
    folder = tmp_path_factory.mktemp("attached")
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY, max_position_embeddings=4096, num_hidden_layers=3)
    library.attach(model, TINY_CONFIG)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def long_text(tmp_path: Path) -> str:
    file = tmp_path / "long.txt"
    file.write_text(TEXT)
    return str(file)


def figures(file: Path) -> dict[str, Any]:
    """What a run wrote, but for the times."""
    found = json.loads(file.read_text())
    del found["seconds"]
    return found


def flat(text: str) -> str:
    return " ".join(text.split())


def test_all_tasks(dsa: Run, attached: str, long_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at once, twice: the same figures."""
    monkeypatch.setattr("dsa.eval.tasks.HAYSTACKS", 2)
    options = ("--tasks", ALL, "--tokens", "90", "--lengths", "1500", "--needle-kinds", "single,multi-key")
    files = [tmp_path / name for name in ("first.json", "second.json")]
    for file in files:
        result = dsa("eval", attached, "--file", long_text, *options, "--json", str(file), "--seed", "3")
        assert result.exit_code == 0, result.output
    first, second = map(figures, files)
    assert first == second
    assert first["tasks"] == ALL.split(",")
    assert set(first["perplexity"]) == set(READERS)
    assert [row["layer"] for row in first["mass"]["layers"]] == [0, 1, 2]
    found = {(row["kind"], row["reader"]) for row in first["needles"]}
    assert found == {(kind, reader) for kind in ("single", "multi-key") for reader in READERS[1:]}
    assert set(first["agreement"]) == set(READERS) - {"dense"}
    for words in ("ratio to dense", "Needles: share of the answers found", "multi-key", "Greedy continuations, random"):
        assert words in flat(result.stdout)
    shown = result.stdout.replace(str(files[1]), "").splitlines()
    assert max(map(len, shown)) <= 80
    assert "Needles (multi-key) in 1,500 tokens" in result.stderr


def test_another_seed(dsa: Run, attached: str, long_text: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("first.json", "second.json")]
    for seed, file in enumerate(files):
        options = ("--tasks", "perplexity", "--tokens", "90", "--seed", str(seed), "--json", str(file))
        assert dsa("eval", attached, "--file", long_text, *options).exit_code == 0
    first, second = (figures(file)["perplexity"] for file in files)
    assert {name for name in READERS if first[name] != second[name]} == {"random"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--tasks", "perplexity,masse"), "tasks: expected some of comparison, perplexity, mass, needles, agreement"),
        (("--tasks", "masse"), "did you mean mass?"),
        (("--tasks", ","), "got none"),
        (("--tasks", "comparison,mass"), "comparison times whole models and runs alone"),
        (
            ("--tasks", "needles", "--needle-kinds", "multikey"),
            "needle-kinds: expected some of single, multi-key, multi-value, variable-tracking, got 'multikey'",
        ),
        (("--tasks", "mass", "--needle-kinds", "all"), "needle-kinds: only needles have them"),
        (("--lengths", "2048"), "lengths: only needles have them"),
        (("--tasks", "needles", "--lengths", "2k"), "lengths: expected whole numbers"),
        (("--tasks", "needles", "--lengths", "200"), "length must leave room for 10 needles (single)"),
        (("--tasks", "needles", "--lengths", "9000"), "needs a text of"),
        (("--tasks", "mass", "--plot", "figures.gif"), "plot: expected a file name that ends in"),
    ],
)
def test_mistakes(dsa: Run, attached: str, long_text: str, options: tuple[str, ...], expected: str) -> None:
    result = dsa("eval", attached, "--file", long_text, *options)
    assert result.exit_code == 2, result.output
    assert expected in flat(result.stderr)
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_model_that_is_not_attached(dsa: Run, tiny: str, text: str) -> None:
    result = dsa("eval", tiny, "--file", text, "--tasks", "perplexity")
    assert result.exit_code == 2
    assert f"{tiny} has no indexers, so there is nothing of DSA to measure" in flat(result.stderr)
    assert "pass --indexers DIR" in flat(result.stderr)
    assert "Traceback" not in result.output
