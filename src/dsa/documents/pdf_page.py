"""The lines of one page of a PDF, with their places: characters from PDFium, ordered as a person reads them."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, field
from statistics import median
from typing import Any

# TeX draws them as one character each, which no tokenizer expects inside a word.
LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
# PDFium writes a hyphen at a line's end so, and no line's end after it.
_HYPHENS = frozenset({0x02, 0xFFFE})
_LEADERS = re.compile(r"(?:[.\u00b7\u2024\u2025\u2026] ?){5,}")
MOST_CHARACTERS = 200_000
"""Of one page: a printed one has about 5,000."""

# In heights of a character: a gap between columns or cells, where words are 0.3 apart.
_COLUMN_GAP = 1.2
_LEAST_LINES = 6
_LEAST_CHARACTERS = 18


class PageTooLong(ValueError):
    """A page with more characters than any that a person reads."""


@dataclass
class Line:
    """Characters of one line that stand together.

    Args:
        text: What it says.
        left, bottom, right, top: Its box, in points from the page's lower left corner.
    """

    text: str
    left: float
    bottom: float
    right: float
    top: float

    @property
    def middle(self) -> float:
        """Its height above the page's lower edge."""
        return (self.bottom + self.top) / 2


@dataclass
class PageText:
    """What a page says.

    Args:
        lines: In reading order.
        unknown: Characters for which the file does not say what they are.
        characters: All but spaces.
    """

    lines: list[Line] = field(default_factory=list)
    unknown: int = 0
    characters: int = 0


def page_text(page: Any, form: Any) -> PageText:
    """Reads a page.

    Args:
        page: A page of pypdfium2.
        form: The document's form environment, `None` where it has no form.
    """
    found = PageText()
    rows = _rows(page, found)
    filled = _fields(page, form)
    lines = _by_columns(rows)
    for each in filled:
        _place(each, lines)
    for line in lines:
        line.text = _cleaned(line.text)
    found.lines = [line for line in lines if line.text]
    found.characters += sum(len(value.text) for value in filled)
    return found


def _rows(page: Any, found: PageText) -> list[list[Line]]:
    """The lines that were drawn, each as the parts between which there are wide gaps."""
    import pypdfium2.raw as raw

    text_page = page.get_textpage()
    count = text_page.count_chars()
    if count > MOST_CHARACTERS:
        raise PageTooLong(f"holds {count:,} characters; {MOST_CHARACTERS:,} are read of one page at most")
    left, bottom, right, top = (ctypes.c_double() for _ in range(4))
    unicode_of, is_unknown, box = raw.FPDFText_GetUnicode, raw.FPDFText_HasUnicodeMapError, raw.FPDFText_GetCharBox
    rows: list[list[Line]] = [[]]
    pending = ""
    for index in range(count):
        code = unicode_of(text_page, index)
        if code in (0x0A, 0x0D):
            pending = ""
            if rows[-1]:
                rows.append([])
            continue
        if code in (0x20, 0xA0, 0x09):
            pending = " "
            continue
        found.characters += 1
        if code == 0 or code == 0xFFFD or 0xE000 <= code <= 0xF8FF or is_unknown(text_page, index) == 1:
            found.unknown += 1
            code = code or 0xFFFD
        character = "-" if code in _HYPHENS else chr(code)
        box(text_page, index, left, right, bottom, top)
        row = rows[-1]
        gap = left.value - row[-1].right if row else 0.0
        height = max(row[-1].top - row[-1].bottom, top.value - bottom.value, 4.0) if row else 0.0
        if not row or gap > _COLUMN_GAP * height or gap < -2 * height:
            row.append(Line(character, left.value, bottom.value, right.value, top.value))
        else:
            part = row[-1]
            part.text += pending + character
            part.left, part.bottom = min(part.left, left.value), min(part.bottom, bottom.value)
            part.right, part.top = max(part.right, right.value), max(part.top, top.value)
        pending = ""
        if code in _HYPHENS:
            rows.append([])
    text_page.close()
    return [row for row in rows if row]


def _by_columns(rows: list[list[Line]]) -> list[Line]:
    """The lines in reading order: as they were drawn, but columns that were drawn across one after the other."""
    gutter = _gutter(rows)
    if gutter is None:
        return [_joined(row) for row in rows]
    lines: list[Line] = []
    columns: tuple[list[Line], list[Line]] = ([], [])
    for row in rows:
        if any(part.left < gutter < part.right for part in row):
            # A heading over both columns ends what stands above it.
            lines += [*columns[0], *columns[1], _joined(row)]
            columns = ([], [])
            continue
        for side in (0, 1):
            parts = [part for part in row if (part.left > gutter) == bool(side)]
            if parts:
                columns[side].append(_joined(parts))
    return [*lines, *columns[0], *columns[1]]


def _gutter(rows: list[list[Line]]) -> float | None:
    """Where the gap between two columns of prose lies that were drawn line by line.

    A table looks alike; its cells are shorter, and do not fill their columns.
    """
    across = [row for row in rows if len(row) == 2 and row[1].left > row[0].right]
    if len(across) < _LEAST_LINES or 2 * len(across) < len(rows):
        return None
    gutter = (median(row[0].right for row in across) + median(row[1].left for row in across)) / 2
    fitting = [row for row in across if row[0].right < gutter + 1 and row[1].left > gutter - 1]
    if len(fitting) < 0.8 * len(across):
        return None
    for side in (0, 1):
        parts = [row[side] for row in fitting]
        width = max(part.right for part in parts) - min(part.left for part in parts)
        if median(len(part.text) for part in parts) < _LEAST_CHARACTERS:
            return None
        if median(part.right - part.left for part in parts) < 0.7 * width:
            return None
    return gutter


def _joined(row: list[Line]) -> Line:
    return Line(
        "  ".join(part.text for part in row),
        min(part.left for part in row),
        min(part.bottom for part in row),
        max(part.right for part in row),
        max(part.top for part in row),
    )


def _fields(page: Any, form: Any) -> list[Line]:
    """What has been filled into a form, and notes written onto the page."""
    import pypdfium2.raw as raw

    found: list[Line] = []
    for index in range(raw.FPDFPage_GetAnnotCount(page)):
        annotation = raw.FPDFPage_GetAnnot(page, index)
        if not annotation:
            continue
        kind = raw.FPDFAnnot_GetSubtype(annotation)
        name = value = ""
        if kind == raw.FPDF_ANNOT_WIDGET and form is not None:
            name, value = _field(annotation, form)
        elif kind == raw.FPDF_ANNOT_FREETEXT:
            value = _string(
                lambda buffer, size, a=annotation: raw.FPDFAnnot_GetStringValue(a, b"Contents", buffer, size)
            )
        rectangle = raw.FS_RECTF()
        raw.FPDFAnnot_GetRect(annotation, rectangle)
        raw.FPDFPage_CloseAnnot(annotation)
        if value.strip():
            box = (rectangle.left, rectangle.bottom, rectangle.right, rectangle.top)
            found.append(_Value(value.strip(), *box, name.rpartition(".")[2].strip()))
    return found


@dataclass
class _Value(Line):
    name: str = ""


def _field(annotation: Any, form: Any) -> tuple[str, str]:
    import pypdfium2.raw as raw

    kind = raw.FPDFAnnot_GetFormFieldType(form, annotation)
    name = _string(lambda buffer, size: raw.FPDFAnnot_GetFormFieldName(form, annotation, buffer, size))
    if kind in (raw.FPDF_FORMFIELD_CHECKBOX, raw.FPDF_FORMFIELD_RADIOBUTTON):
        return name, "[x]" if raw.FPDFAnnot_IsChecked(form, annotation) else ""
    if kind in (raw.FPDF_FORMFIELD_PUSHBUTTON, raw.FPDF_FORMFIELD_SIGNATURE):
        return name, ""
    return name, _string(lambda buffer, size: raw.FPDFAnnot_GetFormFieldValue(form, annotation, buffer, size))


def _string(get: Any) -> str:
    """A string of PDFium: asked for its bytes first, then for itself, UTF-16 with a NUL at the end."""
    size = get(None, 0)
    if size <= 2:
        return ""
    buffer = ctypes.create_string_buffer(size)
    get(ctypes.cast(buffer, ctypes.POINTER(ctypes.c_ushort)), size)
    return buffer.raw[: size - 2].decode("utf-16-le", "replace")


def _place(value: Line, lines: list[Line]) -> None:
    """Puts what a field holds after the words that stand to its left, else into a line of its own with its name."""
    height = max(value.top - value.bottom, 1.0)
    near = [
        line
        for line in lines
        if line.left < value.left and value.bottom - 0.2 * height <= line.middle <= value.top + 0.2 * height
    ]
    if near:
        label = min(near, key=lambda line: abs(value.left - line.right))
        label.text += f" {value.text}"
        label.right = max(label.right, value.right)
        return
    name = getattr(value, "name", "")
    line = Line(f"{name}: {value.text}" if name else value.text, value.left, value.bottom, value.right, value.top)
    below = next((index for index, each in enumerate(lines) if each.middle < value.middle), len(lines))
    lines.insert(below, line)


def _cleaned(text: str) -> str:
    """Without ligatures, dot leaders and halves of surrogate pairs; pairs of halves become the character."""
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return _LEADERS.sub("... ", text.translate(LIGATURES)).strip()
