"""Running headers and footers: lines that stand at the same place of page after page, read once."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dsa.documents.pdf_page import Line

_NUMBER = re.compile(r"\d+")
# In points: a header stands where it stood on the page before.
_SAME_PLACE = 2.0
# Left and right pages have headers of their own.
_BACK = 2
_LEAST_PAGES = 4


def without_running(pages: Sequence[list[Line]], numbers: Sequence[int]) -> tuple[list[list[Line]], int]:
    """The lines of each page without those that repeat the header or footer of a page before.

    A line goes where the outermost lines of most pages repeat at one place; all but a page's own number has to be the
    same. A page keeps its lines where nothing else would be left.

    Args:
        pages: Lines of each page.
        numbers: Of the pages.

    Returns:
        The lines that are left, and how many went.
    """
    kept = [list(lines) for lines in pages]
    gone = 0
    for outermost in (0, -1):
        # A header may have two lines, and a page number under it.
        for _ in range(2):
            ends = [lines[outermost] if len(lines) > 1 else None for lines in kept]
            repeats = [
                any(
                    _repeats(ends[page], ends[page - back], numbers[page] - numbers[page - back])
                    for back in range(1, min(_BACK, page) + 1)
                )
                for page in range(len(ends))
            ]
            if len(pages) < _LEAST_PAGES or 2 * sum(repeats) < len(pages):
                break
            for lines, repeated in zip(kept, repeats, strict=True):
                if repeated:
                    lines.pop(outermost)
                    gone += 1
    return kept, gone


def _repeats(line: Line | None, before: Line | None, distance: int) -> bool:
    if line is None or before is None or abs(line.middle - before.middle) > _SAME_PLACE:
        return False
    if _NUMBER.sub("#", line.text) != _NUMBER.sub("#", before.text):
        return False
    # Of numbers, the page's own grows with the pages; others have to stay.
    pairs = zip(_NUMBER.findall(line.text), _NUMBER.findall(before.text), strict=True)
    return all(now == then or int(now) - int(then) == distance for now, then in pairs)
