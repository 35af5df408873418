"""The text that a reader of an HTML page sees, from the tree that a browser makes of it."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from typing import Any

from justhtml import JustHTML

from dsa.text import tidy

BLOCKS = frozenset(
    """
    address article aside blockquote body br caption center dd details dialog dir div dl dt fieldset figcaption figure
    footer form h1 h2 h3 h4 h5 h6 header hr legend li listing main menu ol optgroup option p plaintext pre search
    section summary svg table tbody tfoot thead tr ul xmp
    """.split()  # noqa: SIM905
)
# What a browser never shows, in HTML and inside SVG.
UNSEEN = frozenset(
    """
    area audio base canvas datalist defs desc head iframe link meta metadata noembed noframes noscript
    param script style symbol template title video clippath mask
    """.split()  # noqa: SIM905
)
VERBATIM = frozenset({"listing", "plaintext", "pre", "textarea", "xmp"})
# What of the unseen held words for a reader, so that leaving much of it out is said.
_UNSEEN_WORDS = frozenset({"datalist", "dialog", "iframe", "noembed", "noframes", "noscript", "template"})
_SHOWN_INPUTS = frozenset({"", "button", "date", "email", "number", "reset", "search", "submit", "tel", "text", "url"})
_HIDING = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*(?:hidden|collapse))\b", re.IGNORECASE)
_FORMULA = re.compile(r"math|\btex\b|latex|formula|equation", re.IGNORECASE)
_SPACE = re.compile(r"[ \t\n\f\r]+")
# A text that begins with `<` is joined to its neighbour by the parser one character at a time.
_LONE_LESS_THAN = re.compile(r"<(?![A-Za-z/!?])")
_TAG = re.compile(r"<[^<>]*>")
_WORDS_IN_TAGS = re.compile(r"\b(?:alt|alttext|value)\s*=", re.IGNORECASE)
_CELL = "  "
_FORMATTING = re.compile(r"<(/?)(?:b|big|code|em|font|i|s|small|strike|strong|tt|u)(?=[\s/>])", re.IGNORECASE)
# So many formatting elements may be open at once: a parser opens all of them again in each paragraph.
_MOST_FORMATTING = 8
# Below this nobody misses what was left out.
_MUCH = 200
_MUCH_SHARE = 0.25


class _Visible:
    """Gathers visible text: block elements begin a line, white space outside `<pre>` collapses."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.after_space = True
        self.left_out: Counter[str] = Counter()

    def line(self) -> None:
        self.parts.append("\n")
        self.after_space = True

    def write(self, text: str, verbatim: bool) -> None:
        if not verbatim:
            text = _SPACE.sub(" ", text)
            if self.after_space:
                text = text.removeprefix(" ")
        if text:
            self.parts.append(text)
            self.after_space = text[-1] in " \n"


def html_text(page: str, name: str = "the page") -> str:
    """The visible text of an HTML page.

    Scripts, styles, the head, navigation and what is hidden are left out; of a formula its TeX is taken where the page
    carries it. Style sheets are not applied.

    Args:
        page: The page.
        name: What to call it where much is left out, which is warned of.
    """
    if not _TAG.sub("", page).strip() and not _WORDS_IN_TAGS.search(page):
        return ""
    tree = JustHTML(_bounded(page), sanitize=False)
    seen = _Visible()
    # A node is taken from the end of the list; what follows it there comes later in the text. Nesting costs no stack.
    todo: list[tuple[Any, bool]] = [(tree.root, False)]
    while todo:
        node, verbatim = todo.pop()
        if isinstance(node, str):
            if node == "\n":
                seen.line()
            elif node != _CELL:
                seen.write(node, verbatim)
            elif not seen.after_space:
                seen.write(node, True)
            continue
        name_of = node.name.lower()
        if name_of == "#text":
            seen.write(node.data or "", verbatim)
            continue
        if name_of.startswith(("#comment", "!")):
            continue
        reason = _unseen(node, name_of)
        if reason:
            if reason in _UNSEEN_WORDS or reason not in UNSEEN:
                seen.left_out[reason] += len(_SPACE.sub(" ", _all_text(node)).strip())
            continue
        todo.extend(reversed(_pieces(node, name_of, verbatim or name_of in VERBATIM)))
    text = tidy("".join(seen.parts))
    _warn_of_omissions(seen.left_out, len(text), name)
    return text


def _bounded(page: str) -> str:
    """The page in a form that costs no more to parse than its length says; its text is the same."""
    page = _LONE_LESS_THAN.sub("&lt;", page)
    open_now = most = 0
    for tag in _FORMATTING.finditer(page):
        open_now = max(0, open_now - 1) if tag[1] else open_now + 1
        most = max(most, open_now)
    return page if most <= _MOST_FORMATTING else _FORMATTING.sub(r"<\1span", page)


def _unseen(node: Any, name: str) -> str | None:
    """Why an element is left out, if it is."""
    attributes = node.attrs or {}
    if name in UNSEEN:
        # SVG and HTML both have titles; neither is part of the page.
        return name
    if name == "nav" or (attributes.get("role") or "").lower() == "navigation":
        return "navigation"
    if name == "dialog" and "open" not in attributes:
        return name
    # What is hidden until it is searched for can be found by a reader.
    if "hidden" in attributes and (attributes["hidden"] or "").lower() != "until-found":
        return "hidden"
    if _HIDING.search(attributes.get("style") or ""):
        return "hidden"
    # KaTeX writes each formula twice: as MathML for readers, and as boxes.
    return "boxes of a formula" if "katex-html" in (attributes.get("class") or "").split() else None


def _pieces(node: Any, name: str, verbatim: bool) -> list[tuple[Any, bool]]:
    """What stands for an element: its children, with line ends and marks as strings among them."""
    children = [(child, verbatim) for child in node.children or ()]
    attributes = node.attrs or {}
    if node.namespace == "math":
        return _formula(node, name, children)
    if node.namespace == "svg" and name == "text":
        return [("\n", False), *children, ("\n", False)]
    if name == "br":
        return [("\n", False)]
    if name in BLOCKS:
        return [("\n", False), *children, ("\n", False)]
    if name in ("td", "th"):
        return [(_CELL, False), *children]
    if name == "img":
        kind = f"{attributes.get('class') or ''} {attributes.get('role') or ''}"
        alt = attributes.get("alt") or ""
        return [(alt, False)] if _FORMULA.search(kind) or "\\" in alt else []
    if name == "input":
        shown = (attributes.get("type") or "").lower() in _SHOWN_INPUTS
        return [(f" {attributes.get('value') or ''} ", False)] if shown else []
    if name == "select":
        return _chosen(node, children)
    return children


def _chosen(node: Any, children: list[tuple[Any, bool]]) -> list[tuple[Any, bool]]:
    """What a list box shows: a closed one its choice, an open one all."""
    attributes = node.attrs or {}
    if "multiple" in attributes or (attributes.get("size") or "1") not in ("0", "1"):
        return children
    options = [
        each
        for child, _ in children
        for each in (child, *(child.children or () if child.name == "optgroup" else ()))
        if each.name == "option"
    ]
    chosen = [each for each in options if "selected" in (each.attrs or {})]
    return [(each, False) for each in (chosen[-1:] or options[:1])]


def _formula(node: Any, name: str, children: list[tuple[Any, bool]]) -> list[tuple[Any, bool]]:
    """A formula as text: its TeX where there is one, else its marks in a row with `^`, `_` and `/`."""
    attributes = node.attrs or {}
    if name == "math" and attributes.get("alttext"):
        return [(attributes["alttext"], False)]
    if name == "semantics":
        for child, _ in children:
            kind = ((child.attrs or {}).get("encoding") or "").lower()
            if child.name == "annotation" and kind in ("application/x-tex", "text/x-tex", "latex", "tex"):
                return [(_all_text(child).strip(), False)]
        return [each for each in children if not each[0].name.startswith("annotation")]
    if name.startswith("annotation"):
        return []
    parts = [each for each in children if each[0].name != "#text" or (each[0].data or "").strip()]
    between = {"mfrac": "/", "msup": "^", "msub": "_", "mover": "^", "munder": "_"}.get(name)
    if between and len(parts) == 2:
        return [*_grouped(parts[0]), (between, False), *_grouped(parts[1])]
    if name in ("msubsup", "munderover") and len(parts) == 3:
        return [*_grouped(parts[0]), ("_", False), *_grouped(parts[1]), ("^", False), *_grouped(parts[2])]
    if name == "msqrt":
        return [("√(", False), *parts, (")", False)]
    return parts


def _grouped(part: tuple[Any, bool]) -> list[tuple[Any, bool]]:
    """Several marks that belong together stand in brackets."""
    inner = [each for each in part[0].children or () if each.name not in ("#text", "#comment")]
    return [("(", False), part, (")", False)] if len(inner) > 1 else [part]


def _all_text(node: Any) -> str:
    """The text of an element and all inside it, seen or not."""
    parts, todo = [], [node]
    while todo:
        node = todo.pop()
        content = getattr(node, "template_content", None)
        if node.name == "#text":
            parts.append(node.data or "")
        elif node.name not in ("script", "style"):
            todo.extend(reversed([*(node.children or ()), *([content] if content is not None else [])]))
    return "".join(parts)


def _warn_of_omissions(left_out: Counter[str], read: int, name: str) -> None:
    total = left_out.total() - left_out["boxes of a formula"]
    if total < _MUCH or total < _MUCH_SHARE * (total + read):
        return
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in left_out.most_common() if kind != "boxes of a formula")
    warnings.warn(
        f"{total:,} characters of {name} were left out because a browser does not show them as part of the page "
        f"({kinds}); {read:,} were read. If they matter, save the page from a browser as text and read that",
        UserWarning,
        stacklevel=4,
    )
