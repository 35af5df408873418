"""What a document is once it has been read: its text, and where its pages lie in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """One page, as a range of characters of the document's text.

    Args:
        number: Counted from 1 as a viewer counts, whatever is printed on the page.
        start: First character.
        end: The character after the last; equal to `start` where the page has no text.
        place: What to call it where the document is several files: `report.pdf, p. 7`.
    """

    number: int
    start: int
    end: int
    place: str = ""


@dataclass(frozen=True)
class SourceDocument:
    """A text and what to call it.

    Args:
        text: The whole text.
        name: A file's path, or a title.
        pages: In order and without gaps, from the text's first character to its last. Empty where the format has no
            pages; the whole text is then one.
        has_pages: Whether `pages` are those of the document itself. `None` takes whether any were given.
    """

    text: str
    name: str
    pages: tuple[Page, ...] = ()
    has_pages: bool | None = None

    def __post_init__(self) -> None:
        if self.has_pages is None:
            object.__setattr__(self, "has_pages", bool(self.pages))
        if not self.pages:
            object.__setattr__(self, "pages", (Page(1, 0, len(self.text)),))

    @classmethod
    def of_pages(cls, name: str, texts: Sequence[str], numbers: Sequence[int] | None = None) -> SourceDocument:
        """A document out of the texts of its pages; an empty line is put after each page that has text.

        Args:
            name: See above.
            texts: Of each page.
            numbers: Of the pages; `None` counts from 1.
        """
        parts = [f"{text}\n\n" if text else "" for text in texts]
        pages, start = [], 0
        for number, part in zip(numbers or range(1, len(parts) + 1), parts, strict=True):
            pages.append(Page(number, start, start + len(part)))
            start += len(part)
        return cls("".join(parts), name, tuple(pages))

    def place(self, number: int) -> str:
        """What to call a page of that number."""
        return next((page.place for page in self.pages if page.number == number), "") or f"p. {number}"

    @property
    def is_joined(self) -> bool:
        """Whether it is several files."""
        return bool(self.pages[0].place)

    def page_of(self, offset: int) -> int:
        """The number of the page that a character is on.

        Args:
            offset: Position in `text`, from 0.

        Raises:
            ValueError: The text has no such character.
        """
        if not 0 <= offset < len(self.text):
            raise ValueError(
                f"offset must be a position in the text of {self.name}, 0 to {len(self.text) - 1}, got {offset}"
            )
        # Pages without text begin where the next one does: the last that begins here is the one with the character.
        return self.pages[bisect_right(self.pages, offset, key=lambda page: page.start) - 1].number
