"""benchmarks/quality.py runs, keeps other rows, replaces its own and finds losses again."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import dsa
from dsa.models.loading import LoadedModel
from dsa.testing.scripts import load_script
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quality.py"
TEXT = "It was a quiet day, and nothing much went on anywhere. Nobody minded that at all! " * 30


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script(SCRIPT)
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY, max_position_embeddings=4096)
    dsa.attach(model, TINY_CONFIG)
    monkeypatch.setattr(module, "load_model", lambda *_, **__: LoadedModel(model, tiny_tokenizer(), "tiny", False))
    return module


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    files = [tmp_path / name for name in ("one.txt", "two.txt")]
    for number, file in enumerate(files):
        file.write_text(TEXT[13 * number :])
    return [str(file) for file in files]


def run(quality: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    # every run begins with the model attached, as it would be loaded
    loaded = quality.load_model()
    if not dsa.models.is_attached(loaded.model):
        dsa.attach(loaded.model, TINY_CONFIG)
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    return int(quality.main())


def test_rows_are_kept_and_replaced(
    quality: ModuleType, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, losses = tmp_path / "out.json", tmp_path / "losses"
    common = ["--json", str(file), "--model", "tiny"]
    reading = ["perplexity", *texts, "--tokens", "200", "--top-k", "16", "--selections", "dsa", "window"]
    for _ in range(2):
        assert run(quality, monkeypatch, *reading, "--losses", str(losses), *common) == 0
    rows = json.loads(file.read_text())["rows"]
    by_row = {(row["row"], row["reader"], row["text"]) for row in rows if row["indexers"] == rows[0]["indexers"]}
    expected = {("perplexity", reader, text) for reader in ("dsa", "window") for text in ("one", "two", "all texts")}
    assert by_row == expected | {("difference", "window", text) for text in ("one", "two", "all texts")}
    assert all(row["compared_tokens"] == (198 if row["text"] == "all texts" else 99) for row in rows)
    assert run(quality, monkeypatch, "mass", *texts, "--tokens", "200", "--top-k", "16", *common) == 0
    after = json.loads(file.read_text())["rows"]
    assert after[: len(rows)] == rows
    assert [row["text"] for row in after[len(rows) :]] == ["one", "two", "all texts"]
    assert after[-1]["environment"]["commit"] is not None
    # what dense attention makes of two texts does not depend on the indexers of a run
    assert len(list(losses.glob("*-dense-*"))) == 2


def test_needles(quality: ModuleType, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.json"
    arguments = ["needles", *texts, "--lengths", "1600", "--haystacks", "2", "--top-k", "16", "--json", str(file)]
    assert run(quality, monkeypatch, *arguments) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert [cell["depth"] for cell in row["cells"]] == [*range(10), None]
    assert row["cells_lower"] == 0
    assert len(row["replies"]) == 2


def test_another_file_is_left_alone(
    quality: ModuleType,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"rows": []}')
    assert run(quality, monkeypatch, "mass", *texts, "--json", str(file)) == 2
    assert "holds no results of this command" in capsys.readouterr().err
    assert file.read_text() == '{"rows": []}'


def test_help(quality: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["perplexity", "--help"], ["needles", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            run(quality, monkeypatch, *arguments)
        assert stopped.value.code == 0
    assert "--haystacks" in capsys.readouterr().out
