"""`dsa generate` on documents: pages, stretched positions, memory, and what it says after the answer."""

import json
import re
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
    assert "this text is 1.3 times longer than" in said
    assert "its first 252 tokens fit (--tokens 252)" in said
    for jargon in ("RoPE", "yarn", "stretched", "extrapolated"):
        assert jargon not in said


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
    result = dsa("generate", tiny, "--file", text, "--json", str(out), "--stats", *FEW)
    assert result.exit_code == 0, result.output
    said = flat(result.stderr)
    assert "324 tokens read in" in said
    assert "4 written at" in said
    assert "counted for this model and these lengths, not measured" in said
    assert "attention pairs" not in result.stdout
    figures = json.loads(out.read_text())
    assert figures["answer"].strip() == result.stdout.strip()
    assert figures["counted"]["dense"]["attention_pairs"] % (324 * 325 // 2) == 0
    assert figures["counted"]["dense"]["attention_pairs"] > figures["counted"]["dsa"]["attention_pairs"]
    assert figures["rope_scaling"]["factor"] == 1.5
    assert figures["measured"]["read_s"] > 0


def test_the_answer_comes_first(dsa: Run, tiny: str, pdf: str) -> None:
    """Around an answer there are at most three lines: notes of this model, what it took, the pages."""
    many = ("--file", pdf, "--ask", "Which?", "--max-new-tokens", "6", "--top-k", "24", "--local", "4")
    result = dsa("generate", tiny, *many)
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if "note:" not in line and "loading" not in line]
    assert len(said) == 2, said
    assert "tokens read in" in said[0]
    assert "6 written at" in said[0]
    assert re.fullmatch(r"read above all: p\. \d(, \d)*", said[1])
    assert "attention pairs" not in result.stderr
    quiet = dsa("generate", tiny, *many, "--quiet")
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    sources = dsa("generate", tiny, *many, "--sources").stderr
    assert re.search(r"p\. \d, \d+ %: The (first|second|third) page\.", sources)


def test_a_pdf_that_is_too_long_says_how_many_pages_fit(dsa: Run, tiny: str, tmp_path: Path) -> None:
    made = FPDF()
    made.set_font("helvetica", size=12)
    for number in range(6):
        made.add_page()
        made.multi_cell(0, 8, f"Page {number} has about seventy letters on it, all of them in one line.")
    made.output(str(tmp_path / "six.pdf"))
    result = dsa("generate", tiny, "--file", str(tmp_path / "six.pdf"), *FEW)
    assert "its first 3 pages fit (--pages 1-3)" in flat(result.stderr)
    fits = dsa("generate", tiny, "--file", str(tmp_path / "six.pdf"), "--pages", "1-3", *FEW)
    assert "times longer" not in fits.stderr


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


def test_several_files_are_one_document(dsa: Run, tiny: str, tmp_path: Path) -> None:
    folder = tmp_path / "minutes"
    folder.mkdir()
    for name in ("b.txt", "a.txt", "c.txt"):
        (folder / name).write_text(f"What {name} says. " * 30)
    made = tmp_path / "made.json"
    arguments = ("--file", str(folder / "c.txt"), "--file", str(folder), "--ask", "Who?", "--max-new-tokens", "2")
    result = dsa("generate", tiny, *arguments, "--top-k", "272", "--json", str(made))
    assert result.exit_code == 0, result.output
    written = json.loads(made.read_text())
    assert written["document"] == "c.txt, a.txt and 2 others"
    places = {each["place"] for each in written["sources"]["pages"]}
    assert places
    assert places <= {"a.txt", "b.txt", "c.txt"}
    assert "read above all: " + "; ".join(each["place"] for each in written["sources"]["pages"]) in result.stderr


@pytest.mark.parametrize("form", ["int8", "int4", "auto", "fp32"])
def test_weights_in_fewer_bits(dsa: Run, tiny: str, text: str, form: str) -> None:
    result = dsa("generate", tiny, "--file", text, "--tokens", "60", "--weights", form, "--stats", *FEW)
    assert result.exit_code == 0, result.output
    packed = {"int8": "weights int8: 16 in Q8_0", "int4": "weights int4: 2 in Q8_0, 14 in Q4_1", "fp32": "", "auto": ""}
    assert packed[form] in flat(result.stderr)
    assert ("MB now" in result.stderr) == (form in ("int8", "int4"))


def test_weights_that_there_are_not(dsa: Run, tiny: str, text: str) -> None:
    result = dsa("generate", tiny, "--file", text, "--weights", "int2")
    assert result.exit_code == 2
    assert "--weights: expected one of auto, fp32, bf16, int8, int4, got 'int2'" in flat(result.stderr)
