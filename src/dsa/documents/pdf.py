"""The text of a PDF, page by page, through pypdf."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from dsa.documents.pages import chosen_pages
from dsa.documents.source import SourceDocument
from dsa.text import tidy

INSTALL = "pip install 'dsa-attention[pdf]'"

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""Begins a step of so many parts; the context's value is called once per finished part (as `dsa.runs.progress`)."""

# TeX draws them as one character each, which no tokenizer expects inside a word.
_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}


def read_pdf(
    raw: bytes, name: str, argument: str, progress: Progress | None = None, wanted: str | None = None
) -> SourceDocument:
    """A PDF as text, with its pages.

    Args:
        raw: The file.
        name: What to call it.
        argument: What the user called it, for messages.
        progress: Shows how far it is; a page takes about 60 ms.
        wanted: Which pages, as `dsa.documents.pages.chosen_pages` takes it; `None` takes all.

    Raises:
        ValueError: It is encrypted, corrupt, has no pages or no text, or not those wanted, or pypdf is not installed.
    """
    with _quiet():
        pages = _pages(raw, name, argument)
        total = len(pages)
        numbers = list(range(1, total + 1)) if wanted is None else chosen_pages(wanted, total, name)
        count = len(numbers)
        texts = []
        shown = (
            nullcontext(lambda: None)
            if progress is None
            else progress(f"Reading {count} page{'s' * (count != 1)} of {name}", count)
        )
        with shown as advance:
            for number in numbers:
                try:
                    texts.append(_clean(pages[number - 1].extract_text()))
                # pypdf fails in many ways on damaged files, KeyError and RecursionError among them
                except Exception as error:
                    raise ValueError(_corrupt(name, argument, f"page {number}: {error}")) from error
                advance()
    without = sum(not text for text in texts)
    if without == count:
        raise ValueError(
            f"{argument}: none of the {count} page(s) read of {name} has text: they are pictures, as of a scan; "
            "recognise the text first, e.g. with `ocrmypdf IN.pdf OUT.pdf`"
        )
    if without:
        warnings.warn(
            f"{without} of the {count} pages read of {name} have no text (empty, or scanned pictures); "
            "`ocrmypdf` recognises text in pictures",
            UserWarning,
            stacklevel=3,
        )
    return SourceDocument.of_pages(name, texts, numbers)


def _pages(raw: bytes, name: str, argument: str) -> list[Any]:
    try:
        from pypdf import PasswordType, PdfReader
        from pypdf.errors import DependencyError
    except ImportError as error:
        raise ValueError(f"{argument}: reading the PDF {name} needs the package pypdf: {INSTALL} ({error})") from error
    try:
        reader = PdfReader(io.BytesIO(raw))
        # Many files are encrypted for everybody to open, only printing or copying is asked not to be done.
        locked = reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED
        pages = [] if locked else list(reader.pages)
    except DependencyError as error:
        raise ValueError(f"{argument}: the PDF {name} is encrypted, and {error}: {INSTALL}") from error
    except Exception as error:
        raise ValueError(_corrupt(name, argument, str(error) or type(error).__name__)) from error
    if locked:
        raise ValueError(
            f"{argument}: the PDF {name} is encrypted and opens with a password only; decrypt it first, e.g. with "
            "`qpdf --password=PASSWORD --decrypt IN.pdf OUT.pdf`"
        )
    if not pages:
        raise ValueError(f"{argument}: the PDF {name} has no pages; expected a document with text")
    return pages


def _corrupt(name: str, argument: str, problem: str) -> str:
    return (
        f"{argument}: the PDF {name} is corrupt or cut off ({problem}); get it anew, or repair it, e.g. with "
        "`qpdf IN.pdf OUT.pdf`"
    )


def _clean(text: str) -> str:
    """Without ligatures, control characters and halves of surrogate pairs, which fonts without a proper map give."""
    return tidy(text.translate(_LIGATURES).encode("utf-8", "replace").decode("utf-8"))


@contextmanager
def _quiet() -> Iterator[None]:
    """pypdf logs every oddity of a file that it reads all the same."""
    logger = logging.getLogger("pypdf")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
