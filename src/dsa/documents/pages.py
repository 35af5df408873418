"""Which pages of a document a user wants: `12`, `1-50`, `1-10,40-`."""

from __future__ import annotations

import re

_RANGE = re.compile(r"\s*(\d*)\s*(-?)\s*(\d*)\s*")


def chosen_pages(wanted: str, count: int, name: str) -> list[int]:
    """Numbers of the pages, ascending and each once.

    Args:
        wanted: Pages and ranges of them, counted from 1, with commas between; a range without an end goes up to the
            last page, one without a beginning starts with the first.
        count: How many pages there are.
        name: What the document is called, for messages.

    Raises:
        ValueError: This is no range, or the document has no such page.
    """
    found: set[int] = set()
    for part in wanted.split(","):
        match = _RANGE.fullmatch(part)
        begin, dash, end = match.groups() if match else ("", "", "")
        if not begin and not end:
            raise ValueError(f"pages: expected page numbers such as 12, 1-50 or 1-10,40-, got {wanted!r}")
        first = int(begin or 1)
        last = int(end or count) if dash else first
        if first < 1 or (end and last < first):
            raise ValueError(f"pages: {part.strip()!r} must count up from 1, such as 3-7")
        if max(first, last) > count:
            raise ValueError(f"pages: {part.strip()!r} is not in {name}, which has {count} page{'s' * (count != 1)}")
        found.update(range(first, last + 1))
    return sorted(found)
