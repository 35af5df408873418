"""What a GGUF file says of its tensors, read without trusting it: every size and offset is compared with the file's own
size before anything is made from it.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MAGIC = b"GGUF"
VERSIONS = (2, 3)
WIDTHS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""How a value of each type is packed; 8 is a string and 9 a list."""
STRING, LIST = 8, 9
MOST_DIMS = 4
MOST_ALIGNMENT = 1 << 20
LEAST_ENTRY, LEAST_TENSOR = 13, 32
"""Bytes that an entry of the metadata and one of the table of tensors take at least."""

_REMEDY = "copy or download it again"


class Tensor(NamedTuple):
    """One tensor: ggml's number of its type, its shape with the rows first, and where its bytes are in the file."""

    type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Everything in front of the tensors.

    Args:
        architecture: Such as `llama`.
        scalars: The single numbers and texts of the metadata.
        tensors: By name.
        nbytes: Of the header; the tensors come after it.
    """

    architecture: str
    scalars: Mapping[str, int | float | str]
    tensors: Mapping[str, Tensor]
    nbytes: int


def read_header(path: Path) -> Header:
    """Reads the header of a GGUF file.

    Raises:
        ValueError: It is no GGUF file, or is cut off or damaged: names what is wrong and where.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError(f"model: {path} is too short for a GGUF file; {_REMEDY}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()


class _Reader:
    """Reads a mapped file from its beginning on."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def fail(self, what: str) -> ValueError:
        return ValueError(f"model: {self.path} is no GGUF file that can be read: {what}; {_REMEDY}")

    def bytes(self, count: int, what: str) -> bytes:
        self.skip(count, what)
        return self.data[self.at - count : self.at]

    def skip(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.fail(f"{what} at byte {self.at:,} takes {count:,} bytes, and {self.size - self.at:,} are left")
        self.at += count

    def number(self, form: str, what: str) -> int | float:
        value: int | float = struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}"), what))[0]
        return value

    def count(self, what: str, least: int) -> int:
        """A number of things of at least so many bytes each."""
        value = int(self.number("Q", what))
        if value > (self.size - self.at) // least:
            raise self.fail(f"{what} is {value:,}, more than {self.size:,} bytes hold")
        return value

    def string(self, what: str) -> str:
        try:
            return self.bytes(self.count(f"the length of {what}", 1), what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} at byte {self.at:,} is not UTF-8") from error

    def header(self) -> Header:
        if self.bytes(4, "the magic") != MAGIC:
            raise self.fail("it does not begin with GGUF")
        version = int(self.number("I", "the version"))
        if version not in VERSIONS:
            raise self.fail(f"expected version {' or '.join(map(str, VERSIONS))}, got {version}")
        tensors, entries = self.count("the number of tensors", LEAST_TENSOR), self.count("that of entries", LEAST_ENTRY)
        scalars: dict[str, int | float | str] = {}
        for _ in range(entries):
            name = self.string("the name of an entry")
            value = self.value(name)
            if value is not None:
                scalars[name] = value
        architecture = scalars.get("general.architecture")
        if not isinstance(architecture, str):
            raise self.fail("general.architecture is missing, or no text")
        alignment = scalars.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
            raise self.fail(f"general.alignment must be a power of two up to {MOST_ALIGNMENT:,}, got {alignment}")
        table = [self.entry() for _ in range(tensors)]
        start = -(-self.at // alignment) * alignment
        found: dict[str, Tensor] = {}
        for name, tensor in table:
            if name in found:
                raise self.fail(f"tensor {name} is there twice")
            if tensor.offset % alignment or tensor.nbytes > self.size - start - tensor.offset:
                raise self.fail(
                    f"tensor {name} has {tensor.nbytes:,} bytes at {tensor.offset:,}, expected a multiple of "
                    f"{alignment} within the {max(0, self.size - start):,} bytes of tensors"
                )
            found[name] = tensor._replace(offset=start + tensor.offset)
        return Header(architecture, scalars, found, start)

    def value(self, name: str) -> int | float | str | None:
        """The value of an entry; `None` for a list, which is passed over."""
        kind = int(self.number("I", f"the type of {name}"))
        if kind == STRING:
            return self.string(name)
        if kind == LIST:
            inner = int(self.number("I", f"the type in {name}"))
            if inner in WIDTHS:
                width = struct.calcsize(f"<{WIDTHS[inner]}")
                self.skip(self.count(f"the length of {name}", width) * width, name)
            elif inner == STRING:
                for _ in range(self.count(f"the length of {name}", 8)):
                    self.skip(self.count(f"the length of a text in {name}", 1), name)
            else:
                raise self.fail(f"{name} is a list of type {inner}, expected numbers or texts")
            return None
        if kind not in WIDTHS:
            raise self.fail(f"{name} has type {kind}, expected one of 0 to 12")
        return self.number(WIDTHS[kind], name)

    def entry(self) -> tuple[str, Tensor]:
        """A tensor of the table, its offset counted from the first tensor."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.string("the name of a tensor")
        dims = int(self.number("I", f"the number of dims of {name}"))
        if not 1 <= dims <= MOST_DIMS:
            raise self.fail(f"tensor {name} has {dims} dims, expected 1 to {MOST_DIMS}")
        sizes = [int(self.number("Q", f"the shape of {name}")) for _ in range(dims)]
        number, offset = int(self.number("I", f"the type of {name}")), int(self.number("Q", f"the offset of {name}"))
        try:
            columns, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
        except (ValueError, KeyError) as error:
            raise self.fail(f"tensor {name} has the unknown block type {number}") from error
        if not all(sizes) or sizes[0] % columns or math.prod(sizes) > 8 * self.size:
            raise self.fail(
                f"tensor {name} is {sizes}, expected rows of a multiple of {columns} numbers that the file has room for"
            )
        return name, Tensor(number, tuple(reversed(sizes)), offset, math.prod(sizes) // columns * nbytes)
