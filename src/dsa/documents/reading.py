"""`read_source` and `read_stdin`: which format a document has, and its text."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from dsa.documents.encoding import decode_html
from dsa.documents.html import html_text
from dsa.documents.pdf import Progress, read_pdf
from dsa.documents.source import SourceDocument
from dsa.text import MOST_BYTES, bounded, decode_text, read_bytes

EXPECTED = "a PDF, HTML, Markdown or UTF-8 text file"

_PDF, _HTML, _TEXT = "PDF", "HTML", "text"
SUFFIXES = {".pdf": _PDF, ".html": _HTML, ".htm": _HTML, ".xhtml": _HTML, ".txt": _TEXT, ".md": _TEXT}
_PDF_MAGIC = b"%PDF-"
# Readers of PDF look for its beginning so far into a file.
_PDF_WITHIN = 1024
# Pictures make a PDF large; the tree of an HTML page takes many times its length.
_MOST_OF_PDF = 512 << 20
_MOST_OF_HTML = 16 << 20
# The HTML standard, on one page, has half as many; each takes some 600 bytes of memory and 5 microseconds.
_MOST_TAGS = 1_000_000
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
        ValueError: The file is empty, encrypted, corrupt, holds no text, or something else than its name says; it is
            larger than what is read of its kind, or a device; or it has no such pages.
    """
    raw = read_bytes(path, argument, EXPECTED, _MOST_OF_PDF if _begins_as_pdf(path) else MOST_BYTES)
    return _read(raw, str(path), argument, SUFFIXES.get(Path(path).suffix.lower()), progress, pages)


def read_stdin(
    argument: str = "stdin", *, progress: Progress | None = None, pages: str | None = None
) -> SourceDocument:
    """Reads the document that is piped in, of any format that `read_source` reads; arguments as there.

    Raises:
        ValueError: As in `read_source`, or there is no standard input, or nothing in it.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError(f"{argument}: standard input is closed; pipe text in, or name a file")
    try:
        raw = bounded(sys.stdin.buffer, argument, _MOST_OF_PDF)
    except OSError as error:
        raise ValueError(
            f"{argument}: standard input cannot be read ({error.strerror or error}); name a file"
        ) from error
    if not raw:
        raise ValueError(f"{argument}: nothing was piped in, so the prompt is empty; give --prompt TEXT or --file FILE")
    return _read(raw, "stdin", argument, None, progress, pages)


def _read(
    raw: bytes, name: str, argument: str, named: str | None, progress: Progress | None, pages: str | None
) -> SourceDocument:
    if not raw.strip():
        raise ValueError(f"{argument}: {name} is empty; expected {EXPECTED}")
    held = _held(raw, named)
    _check_name(raw, name, named, held, argument)
    if held == _PDF:
        return read_pdf(raw, name, argument, progress, pages)
    if pages is not None:
        raise ValueError(f"pages: {name} is no PDF and has no pages to choose from; leave --pages out")
    if _HTML in (named, held) and named != _TEXT:
        _check_size(raw, _MOST_OF_HTML, "HTML", name, argument)
        tags = raw.count(b"<")
        if tags > _MOST_TAGS:
            raise ValueError(
                f"{argument}: the HTML file {name} holds {tags:,} tags; {_MOST_TAGS:,} are read at most: split it, or "
                "save the page from a browser as text and read that"
            )
        text = html_text(decode_html(raw, name, argument), name)
        if not text:
            raise ValueError(
                f"{argument}: the HTML file {name} holds no visible text; where scripts make the page, save it from a "
                "browser as text first"
            )
        return SourceDocument(text, name)
    _check_size(raw, MOST_BYTES, "text", name, argument)
    return SourceDocument(decode_text(raw, name, argument), name)


def _begins_as_pdf(path: str | Path) -> bool:
    """Whether a file is a PDF; a pipe cannot be looked into without taking from it."""
    file = Path(path).expanduser()
    if not file.is_file():
        return False
    try:
        with file.open("rb") as opened:
            return _PDF_MAGIC in opened.read(_PDF_WITHIN)
    except OSError:
        return False


def _check_size(raw: bytes, most: int, kind: str, name: str, argument: str) -> None:
    if len(raw) > most:
        raise ValueError(
            f"{argument}: {name} holds {len(raw) / 2**20:,.0f} MiB of {kind}; {most >> 20} MiB is the most that is "
            "read: split it, or take the part that is wanted"
        )


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
