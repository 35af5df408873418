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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--file", "{folder}/none.txt"], "there is no file"),
        (["--file", "{folder}/empty.txt"], "empty"),
        (["--file", "{text}", "--out", "{folder}"], "out: {folder} is a directory"),
        (["--file", "{text}", "--out", "{folder}/no/out.html"], "there is no directory"),
        (["--file", "{text}", "--chat"], "has no chat template"),
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
