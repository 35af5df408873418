"""`read_source`: which format a file has, and its text."""

from __future__ import annotations

import re
from pathlib import Path

from dsa.documents.encoding import decode_html
from dsa.documents.html import html_text
from dsa.documents.pdf import Progress, read_pdf
from dsa.documents.source import SourceDocument
from dsa.text import decode_text, read_bytes

EXPECTED = "a PDF, HTML, Markdown or UTF-8 text file"

_PDF, _HTML, _TEXT = "PDF", "HTML", "text"
_SUFFIXES = {".pdf": _PDF, ".html": _HTML, ".htm": _HTML, ".xhtml": _HTML, ".txt": _TEXT, ".md": _TEXT}
_PDF_MAGIC = b"%PDF-"
# Readers of PDF look for its beginning so far into a file.
_PDF_WITHIN = 1024
_OTHERS = {
    b"PK\x03\x04": "a zip archive, as .docx, .odt and .epub are",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"{\\rtf": "an RTF document",
    b"%!PS": "PostScript",
    b"\x1f\x8b": "compressed by gzip",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
}
_HTML_BEGINS = re.compile(rb"(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.I | re.S)
# Logs and typescripts hold some control characters; what holds so many is no text.
_MOST_CONTROLS = 0.02


def read_source(
    path: str | Path, argument: str = "file", *, progress: Progress | None = None, pages: str | None = None
) -> SourceDocument:
    """Reads a document that a user names.

    PDF keeps its pages. Of HTML the visible text is taken. Markdown and any other text are taken as they are. The
    format is told from the content; a name that says another one is refused.

    Args:
        path: The file.
        argument: What the user called it, for messages.
        progress: Shows how far reading a PDF is.
        pages: Which pages of a PDF, such as `"1-50"` (`dsa.documents.pages.chosen_pages`); `None` takes all.

    Raises:
        OSError: No such file, a directory, or no permission.
        ValueError: The file is empty, encrypted, corrupt, holds no text, or something else than its name says; or it
            has no such pages.
    """
    raw = read_bytes(path, argument, EXPECTED)
    name = str(path)
    if not raw.strip():
        raise ValueError(f"{argument}: {name} is empty; expected {EXPECTED}")
    named = _SUFFIXES.get(Path(path).suffix.lower())
    held = _held(raw, named)
    _check_name(raw, name, named, held, argument)
    if held == _PDF:
        return read_pdf(raw, name, argument, progress, pages)
    if pages is not None:
        raise ValueError(f"pages: {name} is no PDF and has no pages to choose from; leave --pages out")
    if _HTML in (named, held) and named != _TEXT:
        text = html_text(decode_html(raw, name, argument), name)
        if not text:
            raise ValueError(
                f"{argument}: the HTML file {name} holds no visible text; where scripts make the page, save it from a "
                "browser as text first"
            )
        return SourceDocument(text, name)
    text = decode_text(raw, name, argument)
    controls = sum(character < " " and character not in "\t\n\r\f" for character in text)
    if controls > _MOST_CONTROLS * len(text):
        raise ValueError(
            f"{argument}: {name} holds {controls:,} control characters among {len(text):,}: no plain text; expected "
            f"{EXPECTED}"
        )
    return SourceDocument(text, name)


def _held(raw: bytes, named: str | None) -> str | None:
    """The format by content; `None` for plain text and what cannot be told."""
    begin = raw[:_PDF_WITHIN].removeprefix(b"\xef\xbb\xbf").lstrip()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        begin = begin[2:].replace(b"\0", b"")
    # Text about PDFs may name the first bytes of one further on.
    if begin.startswith(_PDF_MAGIC) or (named == _PDF and _PDF_MAGIC in begin):
        return _PDF
    return _HTML if _HTML_BEGINS.match(begin) else None


def _check_name(raw: bytes, name: str, named: str | None, held: str | None, argument: str) -> None:
    if held == _PDF and named not in (_PDF, None):
        raise ValueError(f"{argument}: {name} is called {named}, but holds a PDF; rename it to .pdf")
    for magic, what in _OTHERS.items():
        if raw.startswith(magic):
            raise ValueError(f"{argument}: {name} is {what}; save it as PDF or text first: expected {EXPECTED}")
    if named == _PDF and held != _PDF:
        what = "HTML; rename it to .html" if held == _HTML else f"no PDF; expected {EXPECTED}, with a name that says so"
        raise ValueError(f"{argument}: {name} is called PDF, but holds {what}")
