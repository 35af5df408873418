"""Mistakes that are noticed before anything is loaded: what is said, in three lines at most, and how fast it ends."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import fpdf
import pytest
from typer.testing import Result

Run = Callable[..., Result]
TRAIN = ("train", "default", "--data", "{text}", "--steps", "2")

MISTAKES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("generate", "defualt", "--prompt", "x"), ("'defualt'", "did you mean default?")),
    (("explain", "defalt", "--file", "{text}"), ("'defalt'", "did you mean default?")),
    (("eval", "Default", "--file", "{text}"), ("'Default'", "did you mean default?")),
    (("train", "defaul", "--data", "{text}", "--out", "{new}", "--steps", "2"), ("did you mean default?",)),
    (("generate", "--prompt", "x", "--threads", "5000"), ("--threads", "at most", "5,000")),
    (("explain", "--file", "{text}", "--threads", "5000"), ("--threads", "at most", "5,000")),
    (("eval", "--file", "{text}", "--threads", "5000"), ("--threads", "at most", "5,000")),
    (("demo", "--threads", "5000"), ("--threads", "at most", "5,000")),
    (("generate", "--prompt", "x", "--threads", "0"), ("--threads",)),
    (("generate", "--prompt", "x", "--top-k", "99999999999999999999"), ("--top-k", "at most")),
    (("explain", "--file", "{text}", "--top-k", "99999999999999999999"), ("--top-k", "at most")),
    (("eval", "--file", "{text}", "--top-k", "99999999999999999999"), ("--top-k", "at most")),
    (("generate", "--prompt", "x", "--max-new-tokens", "100000000"), ("--max-new-tokens", "100,000,000")),
    (("generate", "--prompt", "x", "--max-new-tokens", "0"), ("--max-new-tokens",)),
    (("generate", "--prompt", "x", "--temperature", "-1"), ("--temperature",)),
    (("generate", "--prompt", "x", "--top-p", "2"), ("--top-p",)),
    (("generate", "--prompt", ""), ("the prompt is empty", "--prompt TEXT")),
    (("generate", "--ask", "Who?"), ("--ask", "--file FILE")),
    (("generate", "--file", "{text}", "--ask", ""), ("--ask", "the question is empty")),
    (("generate", "--file", "{text}", "--ask", "x", "--prompt", "y"), ("--ask", "one of them")),
    (("generate", "--file", "{missing}"), ("{missing}",)),
    (("generate", "{missing}", "--file", "{missing}"), ("{missing}",)),
    (("generate", "--file", "{occupied}"), ("--file", "{occupied}", ".pdf")),
    (("generate", "--file", "{text}", "--file", "{missing}"), ("--file", "{missing}")),
    (("explain", "--file", "{folder}"), ("--file", "{folder}", "is a directory")),
    (("generate", "--file", "{text}", "--pages", "1"), ("--pages", "is no PDF")),
    (("generate", "--prompt", "x", "--pages", "1"), ("--pages", "--file FILE")),
    (("generate", "--file", "{text}", "--tokens", "1"), ("--tokens",)),
    (("generate", "--file", "{text}", "--json", "{folder}"), ("--json", "is a directory")),
    (("explain", "--file", "{missing}"), ("{missing}",)),
    (("explain", "--file", "{text}", "--out", "{folder}"), ("--out", "is a directory")),
    (("explain", "--file", "{text}", "--ask", " "), ("--ask", "the question is empty")),
    (("explain", "--file", "{text}", "--max-new-tokens", "9999"), ("--max-new-tokens",)),
    (("eval", "--file", "{text}", "--tasks", "perplexty"), ("--tasks", "perplexity")),
    (("eval", "--file", "{text}", "--needle-kinds", "all"), ("--needle-kinds", "--tasks needles")),
    (("eval", "--file", "{text}", "--file", "{text}"), ("--file", "one text")),
    (("eval", "--file", "{text}", "--plot", "{new}.svg"), ("--plot", "is a table")),
    (("eval", "--file", "{text}", "--json", "{folder}"), ("--json", "is a directory")),
    ((*TRAIN, "--out", "{occupied}"), ("--out", "is not empty")),
    ((*TRAIN, "--out", "{text}"), ("--out", "is a file")),
    ((*TRAIN, "--out", "{new}", "--stage", "spars"), ("--stage", "sparse")),
    (("demo", "--tokens", "many"), ("--tokens",)),
    (("demo", "--json", "{folder}"), ("--json", "is a directory")),
    (("export", "default", "--out", "{occupied}"), ("--out", "not an empty folder")),
    (("export", "default", "--out", "{new}", "--json", "{folder}"), ("--json", "is a directory")),
    (("export", "default"), ("--out",)),
    (("generte", "--prompt", "x"), ("generte", "generate")),
    (("generate", "--promt", "x"), ("--promt", "--prompt")),
    (("generate", "--prompt", "x", "--pages", "0"), ("--pages",)),
    (("generate", "--file", "{pdf}", "--pages", "9"), ("--pages", "1")),
    (("generate", "--file", "{pdf}", "--pages", "two"), ("--pages", "two")),
    (("generate", "--file", "{pdf}", "--file", "{text}", "--pages", "1"), ("--pages", "one file")),
    (("generate", "--file", "{empty}"), ("--file", "is empty")),
    (("generate", "--file", "{zip}"), ("--file", "zip archive")),
    (("generate", "--file", "{binary}"), ("--file", "not UTF-8")),
    (("generate", "--prompt", "x", "--store", "{text}"), ("--store", "{text}")),
    (("generate", "--prompt", "x", "--store", "{folder}", "--no-store"), ("--store", "one of them")),
    (("generate", "--prompt", "x", "--seed", "first"), ("--seed",)),
    (("generate", "--prompt", "x", "--json", "{new}/inside/f.json"), ("--json",)),
    (("generate", "{text}", "{text}"), ("unexpected extra argument",)),
    (("explain", "default", "--ask", "Who?"), ("--file",)),
    (("explain", "--file", "{pdf}", "--pages", "9"), ("--pages",)),
    (("explain", "--file", "{text}", "--json", "{folder}"), ("--json", "is a directory")),
    (("read", "default"), ("--file",)),
    (("read", "default", "--file", "{text}", "--no-store"), ("--no-store", "--store DIR")),
    (("read", "default", "--file", "{pdf}", "{pdf}", "--pages", "1"), ("--pages", "one file")),
    (("read", "default", "--file", "{missing}"), ("--file", "{missing}")),
    (("eval", "default"), ("--file",)),
    (("eval", "--file", "{missing}"), ("{missing}",)),
    (("eval", "--file", "{text}", "--tasks", "needles", "--lengths", "few"), ("--lengths",)),
    (("eval", "--file", "{text}", "--tasks", "needles", "--needle-kinds", "singel"), ("--needle-kinds", "single")),
    ((*TRAIN,), ("--out",)),
    ((*TRAIN, "--out", "{new}", "--json", "{folder}"), ("--json", "is a directory")),
    ((*TRAIN, "--out", "{new}", "--lora", "4"), ("--lora", "--stage sparse")),
    ((*TRAIN, "--out", "{new}", "--seq-len", "1"), ("--seq-len", "at least 2")),
    ((*TRAIN, "--out", "{new}", "--lr", "-1"), ("--lr",)),
    (("train", "default", "--data", "{text}", "--out", "{new}", "--steps", "0"), ("--steps", "at least 1")),
    ((*TRAIN, "--out", "{new}", "--config", "{missing}"), ("--config", "{missing}")),
    (("cost", "--tokens", "0"), ("--tokens",)),
    (("cost", "--tokens", "1000", "--model", "qwen"), ("--model", "'qwen'")),
    (("cost", "--tokens", "1000", "--share", "2"), ("--share", "--model")),
    (("calibrate", "default", "--data", "{missing}", "--out", "{new}", "--mass", "0.9"), ("{missing}",)),
    (("calibrate", "default", "--data", "{text}", "--out", "{new}", "--mass", "2"), ("--mass",)),
    (("train", "default", "--data", "{missing}", "--steps", "1", "--out", "{new}"), ("--data", "{missing}")),
    ((*TRAIN, "--out", "{new}", "--holdout", "{missing}"), ("--holdout", "{missing}")),
    ((*TRAIN, "--out", "{new}", "--resume"), ("--resume", "no training run")),
    (("bench", "ops", "--only", "decod"), ("--only", "decode")),
    (("bench", "ops", "--lengths", "many"), ("--lengths", "8192,32768")),
    (("bench", "ops", "--data", "random"), ("--data", "gaussian")),
    (("bench", "ops", "--plot", "{new}.doc"), ("--plot",)),
    (("bench", "show", "{missing}"), ("{missing}",)),
    (("store", "show", "nothing"), ("nothing",)),
    (("models", "{missing}"), ("{missing}",)),
]


@pytest.fixture(scope="module")
def one_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PDF."""
    pdf = fpdf.FPDF()
    pdf.add_page()
    pdf.set_font("Helvetica", size=12)
    pdf.multi_cell(0, text="What a page says.")
    file = tmp_path_factory.mktemp("pdf") / "one.pdf"
    pdf.output(str(file))
    return file


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=[" ".join(each) for each, _ in MISTAKES])
def test_a_mistake_is_said_before_anything_is_loaded(
    dsa: Run,
    text: str,
    one_page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    expected: tuple[str, ...],
) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine").touch()
    for name, content in (("empty.txt", b""), ("a.zip", b"PK\x03\x04 and more"), ("a.bin", b"\xc3\x28 and more")):
        (tmp_path / name).write_bytes(content)
    files = {"empty": "empty.txt", "zip": "a.zip", "binary": "a.bin"}
    names = {name: str(tmp_path / file) for name, file in files.items()} | {"pdf": str(one_page)}
    names |= {"text": text, "folder": str(tmp_path), "occupied": str(occupied)}
    names |= {"new": str(tmp_path / "new"), "missing": str(tmp_path / "missing.pdf")}
    monkeypatch.setattr("dsa.models.loading.load_model", loads_nothing)
    monkeypatch.setenv("COLUMNS", "400")
    result = dsa(*(each.format(**names) for each in arguments), stdin="")
    assert result.exit_code == 2, result.output
    said = result.stderr.replace("\u2502", " ")
    for words in expected:
        assert words.format(**names) in " ".join(said.split())
    # click frames what it says of usage itself, after two lines of usage.
    lines = [
        line for line in said.splitlines() if any(map(str.isalpha, line)) and not line.startswith(("Usage", "Try"))
    ]
    assert len([line for line in lines if "loading libraries" not in line and "\u256d" not in line]) <= 3
    assert result.stdout == ""


def loads_nothing(*_: object, **__: object) -> None:
    raise AssertionError("a model was loaded before the mistake was noticed")


def test_a_missing_tensorboard_is_noticed_first(
    dsa: Run, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("dsa.models.loading.load_model", loads_nothing)
    result = dsa("train", "default", "--data", text, "--steps", "2", "--out", str(tmp_path / "new"), "--tensorboard")
    assert result.exit_code == 2
    assert "needs the package tensorboard: pip install" in " ".join(result.stderr.split())
    assert not os.path.exists(tmp_path / "new")


def test_a_document_in_the_place_of_the_model(dsa: Run, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str, **_: object) -> None:
        asked.append(name)
        raise ValueError("far enough")

    monkeypatch.setattr("dsa.models.loading.load_model", load)
    assert "far enough" in dsa("generate", text, "--ask", "Who?").stderr
    assert asked == ["default"]
