"""`dsa generate` on documents: pages, stretched positions, memory, and what it says behind the answer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fpdf import FPDF
from typer.testing import Result

Run = Callable[..., Result]
FEW = ("--max-new-tokens", "4", "--top-k", "32", "--local", "8")


@pytest.fixture
def pdf(tmp_path: Path) -> str:
    made = FPDF()
    for text in ("The first page.", "The second page.", "The third page."):
        made.add_page()
        made.set_font("helvetica", size=12)
        made.multi_cell(0, 8, text)
    made.output(str(tmp_path / "three.pdf"))
    return str(tmp_path / "three.pdf")


def flat(text: str) -> str:
    return " ".join(text.split())


def test_pages_and_first_tokens(dsa: Run, tiny: str, pdf: str) -> None:
    some = dsa("generate", tiny, "--file", pdf, "--pages", "2-3", "--ask", "Which?", *FEW)
    assert some.exit_code == 0, some.output
    question = len("\n\nQuestion: Which?\nAnswer:")
    assert f"{len('The second page.') + 2 + len('The third page.') + question} tokens read" in some.stderr
    cut = dsa("generate", tiny, "--file", pdf, "--tokens", "9", "--ask", "Which?", *FEW)
    assert f"{9 + question} tokens read" in cut.stderr


def test_positions_are_stretched_as_far_as_needed(dsa: Run, tiny: str, text: str) -> None:
    result = dsa("generate", tiny, "--file", text, *FEW)
    assert result.exit_code == 0, result.output
    said = flat(result.stderr)
    assert "the prompt has 324 tokens and up to 4 follow" in said
    assert "stretched 1.5 times (yarn:1.5)" in said
    assert "extrapolated" not in said


def test_off_says_how_many_tokens_fit_and_they_do(dsa: Run, tiny: str, text: str) -> None:
    off = ("generate", tiny, "--file", text, "--rope-scaling", "off", *FEW)
    refused = dsa(*off)
    assert refused.exit_code == 2
    assert "252 tokens of it fit: give --tokens 252" in flat(refused.stderr)
    assert refused.stdout == ""
    accepted = dsa(*off, "--tokens", "252")
    assert accepted.exit_code == 0, accepted.output
    assert "252 tokens read" in accepted.stderr


def test_an_explicit_scaling_that_is_too_small(dsa: Run, tiny: str, text: str) -> None:
    result = dsa("generate", tiny, "--file", text, "--rope-scaling", "linear:1.25", *FEW)
    assert result.exit_code == 0, result.output
    assert "320 positions with RoPE scaling linear:1.25: those from 320 on are extrapolated" in flat(result.stderr)
    assert result.stderr.count("extrapolated") == 1


def test_memory_is_checked_before_reading(dsa: Run, tiny: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsa.generation.room.available_memory", lambda device: 300_000)
    result = dsa("generate", tiny, "--file", text, *FEW)
    assert result.exit_code == 2
    assert "memory: reading 324 tokens and writing up to 4 takes about" in flat(result.stderr)
    assert "--tokens 100 or fewer --pages" in flat(result.stderr) or "not even" in flat(result.stderr)
    assert result.stdout == ""


def test_what_it_took_beside_dense(dsa: Run, tiny: str, text: str, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    result = dsa("generate", tiny, "--file", text, "--json", str(out), *FEW)
    assert result.exit_code == 0, result.output
    said = flat(result.stderr)
    assert "324 tokens read in" in said
    assert "4 written, then" in said
    assert "counted for this model and these lengths, not measured" in said
    assert "attention pairs" not in result.stdout
    figures = json.loads(out.read_text())
    assert figures["answer"].strip() == result.stdout.strip()
    assert figures["counted"]["dense"]["attention_pairs"] % (324 * 325 // 2) == 0
    assert figures["counted"]["dense"]["attention_pairs"] > figures["counted"]["dsa"]["attention_pairs"]
    assert figures["rope_scaling"]["factor"] == 1.5
    assert figures["measured"]["read_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--file", "{text}", "--pages", "1"], "is no PDF and has no pages to choose from"),
        (["--file", "{pdf}", "--pages", "4"], "which has 3 pages"),
        (["--file", "{pdf}", "--pages", "x"], "expected page numbers such as 12, 1-50"),
        (["--prompt", "x", "--pages", "1"], "there is no PDF to take pages of"),
        (["--file", "{text}", "--tokens", "1"], "--tokens"),
        (["--file", "{text}", "--rope-scaling", "of"], "rope-scaling must look like yarn:4"),
        (["--file", "{text}", "--json", "{folder}"], "json: {folder} is a directory"),
    ],
)
def test_mistakes(
    dsa: Run, tiny: str, text: str, pdf: str, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    names = {"text": text, "pdf": pdf, "folder": str(tmp_path)}
    result = dsa("generate", tiny, *(each.format(**names) for each in arguments))
    assert result.exit_code == 2, result.output
    assert expected.format(**names) in flat(result.stderr.replace("│", " "))
    assert "Traceback" not in result.output
    assert result.stdout == ""
