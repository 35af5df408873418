"""`dsa explain` on a tiny model: what it writes, and how mistakes end before the work begins."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]
SMALL = ("--top-k", "32", "--local", "8", "--max-new-tokens", "4")


def test_the_report_and_its_figures(dsa: Run, tiny: str, text: str, tmp_path: Path) -> None:
    page, figures = tmp_path / "out.html", tmp_path / "out.json"
    arguments = ("--file", text, "--tokens", "150", "--ask", "Why?", "--out", str(page), "--json", str(figures))
    result = dsa("explain", tiny, *arguments, *SMALL)
    assert result.exit_code == 0, result.output
    assert str(page) in result.stdout.replace("\n", "")
    assert "UNTRAINED" in result.stderr
    assert "Only the first 150" in " ".join(result.stderr.split())
    assert page.read_text().startswith("<!doctype html>")
    plain = json.loads(figures.read_text())
    assert plain["document_tokens"] == 150
    assert 1 <= len(plain["tokens"]) <= 4


def test_positions_are_stretched_as_for_generate(dsa: Run, tiny: str, text: str, tmp_path: Path) -> None:
    command = ("explain", tiny, "--file", text, "--out", str(tmp_path / "out.html"), *SMALL)
    result = dsa(*command)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert "1.3 times longer than" in said
    assert "extrapolated" not in said
    refused = dsa(*command, "--rope-scaling", "off")
    assert refused.exit_code == 2
    assert "252 tokens of it fit: give --tokens 252" in " ".join(refused.stderr.split())


def test_memory_is_checked_before_reading(
    dsa: Run, tiny: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsa.generation.room.available_memory", lambda device: 300_000)
    result = dsa("explain", tiny, "--file", text, "--out", str(tmp_path / "out.html"), *SMALL)
    assert result.exit_code == 2
    assert "memory: reading 324 tokens" in " ".join(result.stderr.split())
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--file", "{folder}/none.txt"], "there is no file"),
        (["--file", "{folder}/empty.txt"], "empty"),
        (["--file", "{text}", "--out", "{folder}"], "out: {folder} is a directory"),
        (["--file", "{text}", "--out", "{folder}/no/out.html"], "there is no directory"),
        (["--file", "{text}", "--chat"], "has no chat template"),
        (["--file", "{text}", "--ask", " "], "ask: the question is empty"),
        (["--file", "{text}", "--pages", "1"], "is no PDF and has no pages to choose from"),
    ],
)
def test_mistakes(dsa: Run, tiny: str, text: str, tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "empty.txt").write_text("")
    names = {"text": text, "folder": str(tmp_path)}
    out = [] if "--out" in arguments else ["--out", "{folder}/out.html"]
    result = dsa("explain", tiny, *(each.format(**names) for each in [*arguments, *out]))
    assert result.exit_code == 2, result.output
    assert expected.format(**names) in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
