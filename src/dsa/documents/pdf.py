"""The text of a PDF, page by page, through PDFium."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dsa.documents.pages import chosen_pages
from dsa.documents.pdf_bounds import drawing_bytes, shared, too_large
from dsa.documents.pdf_page import PageText, PageTooLong, page_text
from dsa.documents.running import without_running
from dsa.documents.source import SourceDocument
from dsa.text import tidy

INSTALL = "pip install 'dsa-attention[pdf]'"
MOST_PAGES = 20_000
MOST_CHARACTERS = 16_000_000
"""Of all pages: some four million tokens."""

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""Begins a step of so many parts; the context's value is called once per finished part (as `dsa.runs.progress`)."""

# Shares of characters of which the file does not say what they are.
_SAID_UNKNOWN = 0.01
_MOST_UNKNOWN = 0.5
_ENDS_WITHIN = 2048


def read_pdf(
    raw: bytes, name: str, argument: str, progress: Progress | None = None, wanted: str | None = None
) -> SourceDocument:
    """A PDF as text, with its pages; values of forms stand after their labels, running headers are read once.

    Args:
        raw: The file.
        name: What to call it.
        argument: What the user called it, for messages.
        progress: Shows how far it is; a page takes about 30 ms.
        wanted: Which pages, as `dsa.documents.pages.chosen_pages` takes it; `None` takes all.

    Raises:
        ValueError: It is encrypted, corrupt, has no pages or no text, more pages than are read, or not those wanted;
            it does not say what most of its characters are; or pypdfium2 is not installed.
    """
    document = _opened(raw, name, argument)
    try:
        total = len(document)
        if not total:
            raise ValueError(f"{argument}: the PDF {name} has no pages; expected a document with text")
        if wanted is None and total > MOST_PAGES:
            raise ValueError(
                f"{argument}: the PDF {name} has {total:,} pages; {MOST_PAGES:,} are read at most: choose some with "
                f"--pages 1-{MOST_PAGES}"
            )
        numbers = list(range(1, total + 1)) if wanted is None else chosen_pages(wanted, total, name)
        pages = _read_pages(document, numbers, name, argument, progress, drawing_bytes(raw))
    finally:
        document.close()
    _check_unknown(pages, numbers, name, argument)
    lines, gone = without_running([page.lines for page in pages], numbers)
    texts = [tidy("\n".join(line.text for line in each)) for each in lines]
    count = len(numbers)
    without = sum(not text for text in texts)
    if without == count:
        raise ValueError(
            f"{argument}: none of the {count} page(s) read of {name} has text: they are pictures, as of a scan; "
            "recognise the text first, e.g. with `ocrmypdf IN.pdf OUT.pdf`"
        )
    if without:
        _warn(
            f"{without} of the {count} pages read of {name} have no text (empty, or scanned pictures); "
            "`ocrmypdf` recognises text in pictures"
        )
    if gone:
        _warn(f"{gone:,} running headers and footers of {name} repeat those of the page before and were read once")
    if b"startxref" not in raw[-_ENDS_WITHIN:]:
        _warn(f"the PDF {name} has no end: it is cut off, and pages may be missing; get it anew")
    return SourceDocument.of_pages(name, texts, numbers)


def _opened(raw: bytes, name: str, argument: str) -> Any:
    try:
        import pypdfium2
        import pypdfium2.raw as codes
    except ImportError as error:
        raise ValueError(
            f"{argument}: reading the PDF {name} needs the package pypdfium2: {INSTALL} ({error})"
        ) from error
    if too_large(raw):
        raise ValueError(
            f"{argument}: the PDF {name} holds a stream that unpacks to far more than a page "
            "of text does; print it to a new PDF, or give its text"
        )
    try:
        document = pypdfium2.PdfDocument(raw)
        if document.get_formtype() != codes.FORMTYPE_NONE:
            document.init_forms()
        return document
    except pypdfium2.PdfiumError as error:
        if error.err_code == codes.FPDF_ERR_SECURITY:
            raise ValueError(
                f"{argument}: the PDF {name} is encrypted for holders of a certificate (or in a way that is not "
                "known); open it with the program that has the certificate, and save it without"
            ) from error
        if error.err_code == codes.FPDF_ERR_PASSWORD:
            raise ValueError(
                f"{argument}: the PDF {name} is encrypted and opens with a password only; decrypt it first, e.g. with "
                "`qpdf --password=PASSWORD --decrypt IN.pdf OUT.pdf`"
            ) from error
        raise ValueError(_corrupt(name, argument, str(error))) from error


def _read_pages(
    document: Any, numbers: list[int], name: str, argument: str, progress: Progress | None, size: int
) -> list[PageText]:
    import pypdfium2
    import pypdfium2.raw as codes

    form = document.formenv
    count = len(numbers)
    pages: list[PageText] = []
    held = drawn = 0
    shown = (
        nullcontext(lambda: None)
        if progress is None
        else progress(f"Reading {count} page{'s' * (count != 1)} of {name}", count)
    )
    with shown as advance:
        for number in numbers:
            try:
                page = document[number - 1]
                drawn += codes.FPDFPage_CountObjects(page)
                if shared(drawn, held, size):
                    raise ValueError(
                        f"{argument}: the first {len(pages) + 1:,} pages of {name} draw far more than the {size:,} "
                        "bytes of its drawings hold: many share one; choose fewer of them with --pages"
                    )
                pages.append(page_text(page, form))
                page.close()
            except (pypdfium2.PdfiumError, PageTooLong) as error:
                if isinstance(error, PageTooLong):
                    raise ValueError(f"{argument}: page {number} of {name} {error}") from error
                raise ValueError(_corrupt(name, argument, f"page {number}: {error}")) from error
            held += pages[-1].characters
            if held > MOST_CHARACTERS:
                raise ValueError(
                    f"{argument}: the first {len(pages):,} pages of {name} hold {held:,} characters; "
                    f"{MOST_CHARACTERS:,} are read at most: choose fewer pages with --pages"
                )
            advance()
    return pages


def _check_unknown(pages: list[PageText], numbers: list[int], name: str, argument: str) -> None:
    """Says how much of the text the file leaves open, and refuses one that is open for the most part."""
    unknown, characters = sum(page.unknown for page in pages), sum(page.characters for page in pages)
    if unknown > _MOST_UNKNOWN * characters:
        raise ValueError(
            f"{argument}: the PDF {name} does not say what {unknown:,} of its {characters:,} characters are: its fonts "
            "carry no names for them; recognise the text instead, e.g. with `ocrmypdf --force-ocr IN.pdf OUT.pdf`"
        )
    if unknown > _SAID_UNKNOWN * characters:
        worst = max(range(len(pages)), key=lambda page: pages[page].unknown)
        _warn(
            f"{unknown:,} of the {characters:,} characters of {name} are unknown ({unknown / characters:.0%}; most on "
            f"page {numbers[worst]}): its fonts carry no names for them. `ocrmypdf --force-ocr` recognises them"
        )


def _corrupt(name: str, argument: str, problem: str) -> str:
    return (
        f"{argument}: the PDF {name} is corrupt or cut off, or has no pages ({problem}); get it anew, or repair "
        "it, e.g. with `qpdf IN.pdf OUT.pdf`"
    )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=5)
