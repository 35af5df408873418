"""What documents cost: work that grows as they do, and refusals that take little time and memory."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fpdf import FPDF

from dsa.documents import read_source
from dsa.testing.hostile_pdfs import BOMBS
from dsa.train.sources import documents

PIECES = [
    " ",
    "\n",
    "a",
    "a ",
    "\t \n",
    "é",
    "# ",
    "* ",
    "> ",
    "`",
    "```\n",
    "[a](",
    "![",
    "<b>",
    "&",
    "|",
    "---\n",
    "1. ",
    ". ",
    "\\",
]


def seconds(read: Callable[[], object]) -> float:
    """The processor's time, of which other programs take none; the least of three."""
    taken = []
    for _ in range(3):
        begun = time.process_time()
        read()
        taken.append(time.process_time() - begun)
    return min(taken)


@pytest.mark.parametrize("kind", ["a.txt", "a.md", "a.jsonl"])
@pytest.mark.parametrize("piece", PIECES)
def test_time_grows_as_a_text_does(tmp_path: Path, kind: str, piece: str) -> None:
    """Sixteen times the text takes at most forty times as long: quadratic work would take 256 times."""
    taken = []
    for length in (50_000, 800_000):
        text = "words " + piece * (length // len(piece)) + " words"
        file = tmp_path / f"{length}{kind}"
        file.write_text(json.dumps({"text": text}) if kind == "a.jsonl" else text)
        read = (
            (lambda each=file: list(documents(str(each))))
            if kind == "a.jsonl"
            else (lambda each=file: read_source(each))
        )
        taken.append(seconds(read))
    assert taken[1] < 40 * taken[0] + 0.05


@pytest.mark.parametrize("piece", ["a", "a ", ". ", "- ", "(", "\\", "Y", "1 "])
def test_time_grows_as_a_pdf_does(tmp_path: Path, piece: str) -> None:
    taken = []
    for length in (1_000, 8_000):
        pdf = FPDF()
        pdf.add_page()
        pdf.set_font("helvetica", size=8)
        pdf.multi_cell(0, 4, piece * (length // len(piece)) + "words")
        pdf.output(str(tmp_path / f"{length}.pdf"))
        taken.append(seconds(lambda each=length: read_source(tmp_path / f"{each}.pdf")))
    assert taken[1] < 24 * taken[0] + 0.05


REFUSED = """
import resource, sys, time, warnings
from dsa.documents import read_source
import justhtml, pypdfium2
warnings.simplefilter("ignore")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
begun, before = time.process_time(), peak()
try:
    read_source(sys.argv[1])
except (ValueError, OSError) as error:
    print(peak() - before, time.process_time() - begun, error)
"""


@pytest.mark.parametrize(
    "name",
    ["/dev/zero", "large.txt", "large.html", "nul.txt", "latin.txt", "cut.pdf", "hidden.html", "tags.html", *BOMBS],
)
def test_what_a_refusal_costs(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.startswith("large"):
        with file.open("wb") as opened:
            opened.truncate(70 << 20)
    elif name in ("nul.txt", "latin.txt"):
        file.write_bytes(b"words " * 2_000_000 + (b"\0" if name == "nul.txt" else b"\xf6"))
    elif name == "cut.pdf":
        file.write_bytes(b"%PDF-1.7\n" + b"words " * 2_000_000)
    elif name == "hidden.html":
        file.write_text("<p hidden>words of a page <b>more</b> " * 5_000)
    elif name == "tags.html":
        file.write_text("<html>" + "<b>" * 5_000_000)
    elif name in BOMBS:
        file.write_bytes(BOMBS[name]())
    done = subprocess.run([sys.executable, "-c", REFUSED, str(file)], capture_output=True, text=True, check=True)
    megabytes, taken, message = done.stdout.split(maxsplit=2)
    assert str(file) in message
    assert int(megabytes) <= 200
    assert float(taken) <= 2
