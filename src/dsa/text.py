"""The door for all text: whatever a user names or types comes in here, and every mistake has its own words."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import BinaryIO

TEXT_FILE = "a UTF-8 text file"
MOST_BYTES = 64 << 20
"""What is read of a text at most: over ten million tokens, more than any model reads."""

_SURROGATE = re.compile("[\ud800-\udfff]")
# Logs and typescripts hold some control characters; what holds so many is no text.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
_MOST_CONTROLS = 0.02


def checked(text: str, place: str) -> str:
    """Text that a tokenizer takes and a person wrote, from wherever it came, without its byte order mark.

    Args:
        text: Text as it was decoded, an option of the command line, or a field of a row of data.
        place: Where it came from, as messages begin: `--prompt`, `line 3 of data.jsonl`.

    Raises:
        ValueError: It holds bytes that are not UTF-8, half of a surrogate pair, NUL or more control characters than
            text does. Empty text is left to the caller.
    """
    found = _SURROGATE.search(text)
    if found:
        code = ord(found[0])
        # Python keeps the bytes of arguments that are not UTF-8 in this range.
        what = (
            f"is not UTF-8 text: the byte after {found.start():,} characters is 0x{code - 0xDC00:02x}"
            if 0xDC80 <= code <= 0xDCFF
            else f"holds half of a surrogate pair (U+{code:04X} after {found.start():,} characters), no character"
        )
        raise ValueError(f"{place} {what}; convert it to UTF-8 first, e.g. with iconv, or take that out")
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        raise ValueError(
            f"{place} is binary (it holds NUL after {text.index(chr(0)):,} characters); expected plain UTF-8 text"
        )
    controls = len(_CONTROL.findall(text))
    if controls > _MOST_CONTROLS * len(text):
        raise ValueError(
            f"{place} holds {controls:,} control characters among {len(text):,}: no plain text; expected UTF-8 text"
        )
    return text


def read_text(path: str | Path, argument: str, most: int = MOST_BYTES) -> str:
    """A UTF-8 text file, without its byte order mark.

    Args:
        path: The file.
        argument: What the user called it, for messages.
        most: Bytes that it may have.

    Raises:
        OSError: No such file, a directory, or no permission.
        ValueError: The file is empty, binary, not UTF-8, a device, or larger.
    """
    return decode_text(read_bytes(path, argument, most=most), path, argument)


def existing(path: str | Path, argument: str, expected: str = TEXT_FILE) -> Path:
    """The path of a file or folder that is there. Raises `FileNotFoundError`."""
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"{argument}: there is no file {path}; expected {expected}")
    return file


def read_bytes(path: str | Path, argument: str, expected: str = TEXT_FILE, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file or a pipe.

    Args:
        path: The file.
        argument: What the user called it, for messages.
        expected: What kind of file it is to be, for messages.
        most: Bytes that it may have.

    Raises:
        OSError: No such file, a directory, or no permission.
        ValueError: It is a device, or larger.
    """
    file = existing(path, argument, expected)
    if file.is_dir():
        raise IsADirectoryError(f"{argument}: {path} is a directory; expected {expected}")
    try:
        with file.open("rb") as opened:
            kind = file.stat().st_mode
            if (stat.S_ISCHR(kind) or stat.S_ISBLK(kind)) and not opened.isatty():
                raise ValueError(f"{argument}: {path} is a device and has no end; expected {expected}")
            return bounded(opened, f"{argument}: {path}", most)
    except OSError as error:
        raise OSError(f"{argument}: {path} cannot be read: {error.strerror or error}") from error


def bounded(opened: BinaryIO, place: str, most: int = MOST_BYTES) -> bytes:
    """All that a file or a pipe holds.

    Args:
        opened: To read from.
        place: What to call it, for messages.
        most: Bytes that it may have.

    Raises:
        ValueError: It holds more.
    """
    parts, held = [], 0
    while part := opened.read(min(1 << 20, most + 1 - held)):
        parts.append(part)
        held += len(part)
        if held > most:
            raise ValueError(
                f"{place} holds more than {most >> 20:,} MiB, which is the most that is read; split it, or take the "
                "part that is wanted, e.g. with head -c"
            )
    return b"".join(parts)


def decode_text(raw: bytes, path: str | Path, argument: str) -> str:
    """Bytes of a text file as text, see `read_text`.

    Raises:
        ValueError: They are empty, binary, or not UTF-8.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(
                f"{argument}: {path} is UTF-16, expected UTF-8 text: convert it first, e.g. with `iconv -f UTF-16 -t "
                "UTF-8 IN > OUT`"
            ) from error
        raise ValueError(
            f"{argument}: {path} is not UTF-8 text (byte {error.start} is 0x{raw[error.start]:02x}); "
            "expected plain text: convert it first, e.g. with iconv or pdftotext"
        ) from error
    text = checked(text, f"{argument}: {path}")
    if not text.strip():
        raise ValueError(f"{argument}: {path} is empty; expected text of at least two tokens")
    return text


def tidy(text: str) -> str:
    """Text taken out of another format: no spaces at line ends, at most one empty line in a row, no control
    characters, no soft hyphens, nothing empty at the beginning and the end.
    """
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text.replace("\r\n", "\n").replace("\xa0", " ").replace("\xad", ""))
    # A pattern that ends in \n begins anew at every blank of a long run; this takes a run once.
    text = re.sub(r"[ \t]+(\n?)", lambda run: run[1] or run[0], text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
