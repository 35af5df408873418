"""The file of an entry: one safetensors file with room for more tokens than are in it.

Every tensor is token-major, `[1, C, ...]`, and begins at a page of the file, so that it can be mapped. Rows that were
not written yet are holes: they take no place on the disk. How many rows count stands in another file
(`dsa.store.entry`).

Shapes: `C` capacity in tokens.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsa.runs.json_files import parse_json

FORMAT = "dsa-document"
VERSION = 1

PAGE = 4096
"""Tensors begin at multiples of so many bytes. Capacities are multiples of so many tokens, whatever a row's size."""

MOST_HEADER = 100 << 20
"""The most that a safetensors header may have, in bytes."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

TOKEN_IDS = "token_ids"


class LayoutError(ValueError):
    """A file that is no entry, or a damaged one."""


class NewerVersion(LayoutError):
    """What a newer version of this library wrote."""

    def __init__(self, version: int) -> None:
        super().__init__(f"it is of version {version}, and this dsa reads {VERSION}; use the newer dsa for it")


@dataclass(frozen=True)
class Part:
    """One tensor of the file.

    Args:
        dtype: Of its numbers.
        row: Shape of one token's row.
        offset: Where in the file it begins.
    """

    dtype: torch.dtype
    row: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.row)

    def place(self, token: int) -> int:
        """Where in the file the row of a token begins."""
        return self.offset + token * self.row_bytes


@dataclass(frozen=True)
class Layout:
    """Where everything is.

    Args:
        capacity: `C`.
        parts: The tensors by name: `token_ids`, `layers.N.key` and so on.
        size: Of the file in bytes, holes included.
        metadata: The file's own.
    """

    capacity: int
    parts: dict[str, Part]
    size: int
    metadata: dict[str, str]

    @property
    def token_bytes(self) -> int:
        """What one token takes."""
        return sum(part.row_bytes for part in self.parts.values())


def capacity_for(tokens: int) -> int:
    """Room for so many tokens, for what is asked about them, and for growing to twice their number."""
    return -(-(2 * tokens + 32768) // PAGE) * PAGE


def plan(rows: dict[str, tuple[torch.dtype, tuple[int, ...]]], capacity: int, metadata: dict[str, str]) -> Layout:
    """The layout of a new file.

    Args:
        rows: Dtype and shape of one token's row, by name.
        capacity: `C`, as `capacity_for` returns it.
        metadata: Of the file.
    """
    assert capacity % PAGE == 0
    begin = len(_header(rows, capacity, metadata))
    parts, offset = {}, begin
    for name, (dtype, row) in rows.items():
        parts[name] = Part(dtype, row, offset)
        offset += capacity * parts[name].row_bytes
    return Layout(capacity, parts, offset, metadata)


def create(path: Path, layout: Layout) -> int:
    """Makes the file, readable by its owner only and all holes but for the header; returns its descriptor.

    Raises:
        OSError: It cannot be made.
    """
    rows = {name: (part.dtype, part.row) for name, part in layout.parts.items()}
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(handle, _header(rows, layout.capacity, layout.metadata), 0)
        os.ftruncate(handle, layout.size)
    except BaseException:
        os.close(handle)
        raise
    return handle


def read(handle: int) -> Layout:
    """The layout of an open file.

    Raises:
        LayoutError: It is not of this format, damaged or cut off; `NewerVersion` where it is of one.
        OSError: It cannot be read.
    """
    size = os.fstat(handle).st_size
    length = int.from_bytes(os.pread(handle, 8, 0), "little")
    if not 0 < length <= min(MOST_HEADER, size - 8):
        raise LayoutError("it is no safetensors file, or its beginning is damaged")
    try:
        header = parse_json(os.pread(handle, length, 8), dict[str, Any], "its header", "it is read again")
        metadata = header.pop("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise LayoutError("it was not written by dsa's store, or its header is damaged")
        version = int(metadata["version"])
        if version > VERSION:
            raise NewerVersion(version)
        capacity = int(metadata["capacity"])
        parts, end = {}, 8 + length
        for name, each in header.items():
            begin, stop = each["data_offsets"]
            part = Part(DTYPES[each["dtype"]], tuple(each["shape"][2:]), 8 + length + begin)
            is_whole = each["shape"][:2] == [1, capacity] and stop - begin == capacity * part.row_bytes
            if not is_whole or part.offset != end or part.offset % PAGE:
                raise LayoutError(f"its header is damaged ({name})")
            parts[name], end = part, 8 + length + stop
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, LayoutError):
            raise
        raise LayoutError("its header is damaged") from error
    if size != end or TOKEN_IDS not in parts:
        raise LayoutError(f"it has {size:,} bytes where its header says {end:,}: it was cut off or added to")
    return Layout(capacity, parts, size, metadata)


def _header(rows: dict[str, tuple[torch.dtype, tuple[int, ...]]], capacity: int, metadata: dict[str, str]) -> bytes:
    """The safetensors header, padded with spaces to whole pages."""
    named = {"format": FORMAT, "version": str(VERSION), "capacity": str(capacity), **metadata}
    header: dict[str, object] = {"__metadata__": named}
    end = 0
    for name, (dtype, row) in rows.items():
        begin, end = end, end + capacity * dtype.itemsize * math.prod(row)
        header[name] = {"dtype": _NAMES[dtype], "shape": [1, capacity, *row], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    padded = -(-(8 + len(text)) // PAGE) * PAGE
    return (padded - 8).to_bytes(8, "little") + text.ljust(padded - 8)
