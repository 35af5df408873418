"""Several files, or all of a folder, read as one document that knows which file a page is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dsa.documents.pdf import Progress
from dsa.documents.reading import SUFFIXES, read_source
from dsa.documents.source import Page, SourceDocument


def read_sources(
    paths: Sequence[str | Path], argument: str = "file", *, progress: Progress | None = None, pages: str | None = None
) -> SourceDocument:
    """Reads files and folders as one document, in the order given; a folder's files in the order of their names.

    Args:
        paths: At least one. Of a folder, what `read_source` reads, by the end of the name; not what is in folders in
            it, and no hidden files.
        argument: What the user called them, for messages.
        progress: Shows how far reading a PDF is.
        pages: Which pages of the only PDF; `None` takes all.

    Raises:
        OSError: As in `read_source`, or a folder has nothing to read.
        ValueError: As in `read_source`, or pages were chosen of several files.
    """
    files = [file for path in paths for file in _files_of(Path(path), argument)]
    if pages is not None and len(files) > 1:
        raise ValueError(f"pages: expected one file, got {len(files)}; name the PDF alone, or leave --pages out")
    return joined([read_source(file, argument, progress=progress, pages=pages) for file in files])


def joined(documents: Sequence[SourceDocument]) -> SourceDocument:
    """Documents as one, an empty line between them; pages are counted through, and `place` names file and page."""
    if len(documents) == 1:
        return documents[0]
    text, pages = "", list[Page]()
    for document in documents:
        name = Path(document.name).name
        part = f"{document.text.rstrip()}\n\n"
        for page in document.pages:
            place = f"{name}, p. {page.number}" if document.has_pages else name
            end = len(part) if page is document.pages[-1] else min(page.end, len(part))
            pages.append(Page(len(pages) + 1, len(text) + min(page.start, len(part)), len(text) + end, place))
        text += part
    text = text.rstrip()
    pages = [replace(page, start=min(page.start, len(text)), end=min(page.end, len(text))) for page in pages]
    names = [Path(document.name).name for document in documents]
    name = ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} and {len(names) - 2} others"
    return SourceDocument(text, name, tuple(pages))


def _files_of(path: Path, argument: str) -> list[Path]:
    folder = path.expanduser()
    if not folder.is_dir():
        return [path]
    found = sorted(
        each
        for each in folder.iterdir()
        if each.suffix.lower() in SUFFIXES and each.is_file() and not each.name.startswith(".")
    )
    if not found:
        ends = ", ".join(SUFFIXES)
        raise FileNotFoundError(f"{argument}: the folder {path} has no file whose name ends in one of {ends}")
    return found
