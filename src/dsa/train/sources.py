"""Where training text comes from: text files, JSON lines, parquet files and datasets of the Hugging Face Hub.

Each source yields documents one by one, so that none is ever held as a whole but a text file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsa.runs.json_files import parse_json
from dsa.text import MOST_BYTES, checked, read_text
from dsa.train.extras import needed

HUB = "hub:"
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
DEFAULT_COLUMN = "text"
DEFAULT_SPLIT = "train"
# A text to train on is one document, held as a whole.
_MOST_OF_TEXT = 4 << 30


def documents(source: str, column: str = DEFAULT_COLUMN) -> Iterator[str]:
    """The documents of one source, in order.

    Args:
        source: A UTF-8 text file, one document; a `.jsonl` or `.parquet` file, one document a row; or
            `hub:OWNER/NAME`, `hub:OWNER/NAME:CONFIGURATION`, `hub:OWNER/NAME:CONFIGURATION:SPLIT`, read as a stream.
        column: Which column of the rows holds the text.

    Raises:
        OSError: There is no such file or dataset, or it cannot be read.
        ValueError: Not UTF-8, empty, not rows of that format, or without that column.
        ImportError: Parquet files and the Hub need the package `datasets`.
    """
    if source.startswith(HUB):
        return _hub(source, column)
    path = Path(source)
    if path.suffix in JSON_LINES:
        return _json_lines(path, column)
    if path.suffix == PARQUET:
        return _parquet(path, column)
    return iter([read_text(path, "data", _MOST_OF_TEXT)])


def is_remote(source: str) -> bool:
    """Whether the source is a dataset of the Hub: possibly far larger than what a run reads."""
    return source.startswith(HUB)


def _json_lines(path: Path, column: str) -> Iterator[str]:
    with path.open("rb") as file:
        # A file without line ends, such as a device, ends at the bound of one row.
        for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES + 1), b""), start=1):
            if len(line) > MOST_BYTES:
                raise ValueError(
                    f"data: line {number} of {path} is longer than {MOST_BYTES >> 20} MiB, the most of one row "
                    "that is read; split its text over several rows"
                )
            if not line.strip():
                continue
            try:
                row = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"data: line {number} of {path} is not UTF-8 (byte {error.start} is 0x{line[error.start]:02x}); "
                    "convert the file first, e.g. with iconv"
                ) from error
            remedy = f'expected one object a line, such as {{"{column}": "..."}}'
            parsed: Any = parse_json(row, object, f"data: line {number} of {path}", remedy)
            yield _text_of(parsed, column, f"line {number} of {path}")


def _parquet(path: Path, column: str) -> Iterator[str]:
    datasets = needed("datasets", f"reading {path.name}")
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split=DEFAULT_SPLIT, streaming=True)
        yield from _column(rows, column, str(path))
    except _WrongRow:
        raise
    except _unreadable() as error:
        raise ValueError(f"data: {path} cannot be read as parquet ({_first_line(error)})") from error


def _hub(source: str, column: str) -> Iterator[str]:
    name, configuration, split = _parse_hub(source)
    datasets = needed("datasets", f"reading {source}")
    try:
        rows = datasets.load_dataset(name, configuration, split=split, streaming=True)
        yield from _column(rows, column, source)
    except _WrongRow:
        raise
    except _unreadable() as error:
        raise OSError(
            f"data: {source} cannot be read from the Hugging Face Hub ({_first_line(error)}); check the name, the "
            "configuration, the split and the network, or name a local file"
        ) from error


def _parse_hub(source: str) -> tuple[str, str | None, str]:
    parts = source.removeprefix(HUB).split(":")
    if not parts[0] or len(parts) > 3:
        raise ValueError(f"data: {source!r} must look like hub:OWNER/NAME, or hub:OWNER/NAME:CONFIGURATION:SPLIT")
    name, configuration, split = [*parts, "", ""][:3]
    return name, configuration or None, split or DEFAULT_SPLIT


class _WrongRow(ValueError):
    """A row without text: not to be taken for a file that cannot be read."""


def _column(rows: Any, column: str, name: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        yield _text_of(row, column, f"row {number} of {name}")


def _text_of(row: Any, column: str, place: str) -> str:
    if not isinstance(row, dict) or column not in row:
        columns = ", ".join(map(repr, row)) if isinstance(row, dict) else f"no columns, it is {type(row).__name__}"
        raise _WrongRow(f"data: {place} has no column {column!r}; it has {columns}: choose one with --column")
    text = row[column]
    if not isinstance(text, str):
        raise _WrongRow(
            f"data: column {column!r} of {place} holds {type(text).__name__}, expected text; choose another with "
            "--column"
        )
    try:
        return checked(text, f"data: column {column!r} of {place}")
    except ValueError as error:
        raise _WrongRow(str(error)) from None


def _unreadable() -> tuple[type[Exception], ...]:
    """What `datasets` raises for data that is not there, or is not what its name says."""
    from datasets.exceptions import DatasetsError
    from pyarrow.lib import ArrowException

    return DatasetsError, ArrowException, OSError, ValueError


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
