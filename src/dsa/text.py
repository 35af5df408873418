"""Reading text that a user names, with every mistake in its own words."""

from __future__ import annotations

from pathlib import Path


def read_text(path: str | Path, argument: str) -> str:
    """A UTF-8 text file, without its byte order mark.

    Args:
        path: The file.
        argument: What the user called it, for messages.

    Raises:
        OSError: No such file, a directory, or no permission.
        ValueError: The file is empty, binary, or not UTF-8.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"{argument}: there is no file {path}; expected a UTF-8 text file")
    if file.is_dir():
        raise IsADirectoryError(f"{argument}: {path} is a directory; expected a UTF-8 text file, such as {path}/*.txt")
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise OSError(f"{argument}: {path} cannot be read: {error.strerror or error}") from error
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
