"""Reading text that a user names, with every mistake in its own words."""

from __future__ import annotations

import re
from pathlib import Path

TEXT_FILE = "a UTF-8 text file"


def read_text(path: str | Path, argument: str) -> str:
    """A UTF-8 text file, without its byte order mark.

    Args:
        path: The file.
        argument: What the user called it, for messages.

    Raises:
        OSError: No such file, a directory, or no permission.
        ValueError: The file is empty, binary, or not UTF-8.
    """
    return decode_text(read_bytes(path, argument), path, argument)


def read_bytes(path: str | Path, argument: str, expected: str = TEXT_FILE) -> bytes:
    """The bytes of a file.

    Args:
        path: The file.
        argument: What the user called it, for messages.
        expected: What kind of file it is to be, for messages.

    Raises:
        OSError: No such file, a directory, or no permission.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"{argument}: there is no file {path}; expected {expected}")
    if file.is_dir():
        raise IsADirectoryError(f"{argument}: {path} is a directory; expected {expected}, such as {path}/*.txt")
    try:
        return file.read_bytes()
    except OSError as error:
        raise OSError(f"{argument}: {path} cannot be read: {error.strerror or error}") from error


def decode_text(raw: bytes, path: str | Path, argument: str) -> str:
    """Bytes of a text file as text, see `read_text`.

    Raises:
        ValueError: They are empty, binary, or not UTF-8.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{argument}: {path} is not UTF-8 text (byte {error.start} is 0x{raw[error.start]:02x}); "
            "expected plain text: convert it first, e.g. with iconv or pdftotext"
        ) from error
    if "\0" in text:
        raise ValueError(f"{argument}: {path} is binary (it holds NUL bytes); expected plain UTF-8 text")
    if not text.strip():
        raise ValueError(f"{argument}: {path} is empty; expected text of at least two tokens")
    return text


def tidy(text: str) -> str:
    """Text taken out of another format: no spaces at line ends, at most one empty line in a row, no control
    characters, no soft hyphens, nothing in front or behind.
    """
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text.replace("\r\n", "\n").replace("\xa0", " ").replace("\xad", ""))
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
