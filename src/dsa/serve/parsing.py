"""A document that a client sent, read in a process of its own with limits on memory and time.

    python -m dsa.serve.parsing FILE

Writes JSON to stdout: `text` and `pages` (number, first character, end), or `error` in words.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dsa.documents import Page, SourceDocument, read_source

MOST_MEMORY = 2 << 30
"""Bytes of address space."""

MOST_S = 120
"""Seconds of one processor, and twice as many on the clock."""

MOST_PAGES = 5_000
MOST_CHARACTERS = 32 << 20
SUFFIXES = {".pdf", ".html", ".htm", ".md", ".markdown", ".txt"}

TOO_MUCH = "file: reading it takes more than {} MB of memory or {} s; send a part of it, or its text"


def parse(raw: bytes, filename: str) -> SourceDocument:
    """Reads a document out of a client's bytes, elsewhere; blocks until it is read.

    Args:
        raw: PDF, HTML, Markdown or text.
        filename: What the client calls it. Only its suffix says something, and only one that is known.

    Raises:
        ValueError: It cannot be read, is none of these, or takes too much; in words for the client.
    """
    suffix = Path(filename.replace("\\", "/")).suffix.lower()
    name = f"upload{suffix if suffix in SUFFIXES else ''}"
    folder = Path(tempfile.mkdtemp(prefix="dsa-upload-"))
    try:
        (folder / name).write_bytes(raw)
        command = [sys.executable, "-P", "-m", "dsa.serve.parsing", name]
        # The folder is the process's own; what else it could write to is bounded by what it is told.
        finished = subprocess.run(
            command, cwd=folder, env=_environment(), capture_output=True, timeout=2 * MOST_S, check=False
        )
        plain = json.loads(finished.stdout) if finished.returncode == 0 else {}
    except (subprocess.TimeoutExpired, ValueError):
        plain = {}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not plain:
        raise ValueError(TOO_MUCH.format(MOST_MEMORY >> 20, MOST_S))
    if "error" in plain:
        raise ValueError(plain["error"].replace(name, "the file"))
    return from_plain(plain, shown_name(filename))


def shown_name(filename: str) -> str:
    """A client's file name as it is shown: no folders, nothing that cannot be printed, not too long."""
    base = filename.replace("\\", "/").rpartition("/")[2]
    printable = "".join(character for character in base if character.isprintable()).strip(". ")
    return printable[:120] or "document"


def to_plain(document: SourceDocument) -> dict[str, Any]:
    """A document as JSON."""
    pages = [[page.number, page.start, page.end] for page in document.pages] if document.has_pages else []
    return {"text": document.text, "pages": pages}


def from_plain(plain: dict[str, Any], name: str) -> SourceDocument:
    """The document that `to_plain` wrote."""
    return SourceDocument(plain["text"], name, tuple(Page(*page) for page in plain["pages"]))


def _environment() -> dict[str, str]:
    """Nothing of the server's own, such as keys, but the place that this package lies in."""
    kept = ("PATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR")
    source = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": source, **{name: os.environ[name] for name in kept if name in os.environ}}


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_S, MOST_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):
        # macOS knows this limit and does not take it.
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))


def _read(name: str) -> dict[str, Any]:
    try:
        document = read_source(name)
    except (ValueError, OSError, ImportError) as error:
        return {"error": str(error)}
    if len(document.pages) > MOST_PAGES:
        return {"error": f"file: it has {len(document.pages):,} pages; {MOST_PAGES:,} is the most that is read"}
    if len(document.text) > MOST_CHARACTERS:
        return {"error": f"file: it holds {len(document.text):,} characters; {MOST_CHARACTERS:,} is the most"}
    return to_plain(document)


if __name__ == "__main__":
    _limit()
    try:
        sys.stdout.write(json.dumps(_read(sys.argv[1])))
    except (MemoryError, RecursionError):
        sys.exit(3)
