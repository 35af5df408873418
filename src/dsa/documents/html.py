"""The text that a reader of an HTML page sees."""

from __future__ import annotations

import re
from html.parser import HTMLParser

BLOCKS = frozenset(
    """
    address article aside blockquote br caption dd details div dl dt fieldset figcaption figure footer form h1 h2 h3 h4
    h5 h6 header hr li main ol p pre section summary table tbody tfoot thead tr ul
    """.split()  # noqa: SIM905
)
SKIPPED = frozenset({"button", "head", "math", "nav", "noscript", "script", "select", "style", "svg"})

_CHARSET = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_DECLARED_WITHIN = 1024


class _Text(HTMLParser):
    """Visible text: block elements begin a line, white space outside `<pre>` collapses."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping: list[str] = []
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipping == ["head"] and (tag == "body" or tag in BLOCKS):
            # Pages may leave the end of the head out.
            self.skipping = []
        if tag in SKIPPED:
            self.skipping.append(tag)
        if tag in BLOCKS:
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append("  ")
        self.verbatim += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self.skipping:
            # Pages leave inner elements open; closing the outer one closes them too.
            del self.skipping[self.skipping.index(tag) :]
        if tag in BLOCKS:
            self.parts.append("\n")
        self.verbatim = max(0, self.verbatim - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """The visible text of an HTML page; scripts, styles, the head and navigation are left out."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    return "".join(parser.parts)


def declared_encoding(raw: bytes) -> str | None:
    """The encoding that an HTML file names in its first kilobyte, if any."""
    found = _CHARSET.search(raw[:_DECLARED_WITHIN])
    return found[1].decode("ascii") if found else None
