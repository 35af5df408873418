"""One stored document: a folder with its rows, how many of them count, and what they add up to.

    rows.safetensors     token ids, K, V, index keys (`dsa.store.layout`)
    state.json           how many tokens count; written after them, as a whole
    checks.json          sums of every chunk of rows
    window-N.safetensors what the sliding-window layers hold after N tokens
    tail-*.safetensors   what conversations added (`dsa.store.tails`)

Rows that count are never written again, so whoever has mapped them is safe. An entry without `state.json` is none.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from typing_extensions import TypedDict

from dsa.runs.files import write_atomically
from dsa.runs.json_files import Count, Size, parse_json, read_json
from dsa.store.binding import Binding
from dsa.store.layout import TOKEN_IDS, VERSION, Layout, LayoutError, NewerVersion, read

ROWS, STATE, CHECKS = "rows.safetensors", "state.json", "checks.json"

MASK = (1 << 64) - 1


class _Sliding(TypedDict):
    """How the cache of a layer with a sliding window is made."""

    kind: Literal["sliding"]
    window: Size


class _Indexed(TypedDict):
    """The same of a layer that keeps all tokens."""

    kind: Literal["indexed"]
    index_dtype: Literal["int8", "fp8", "fp32"] | None
    dtype: Literal["float64", "float32", "float16", "bfloat16"]


class _Latent(_Indexed):
    """The same of a layer that keeps latents."""

    kind: Literal["latent"]  # type: ignore[misc]
    latent_dim: Size
    rows_dtype: Literal["full", "fp8"]
    rope_dim: Count | None


@dataclass(frozen=True)
class State:
    """How far an entry goes.

    Args:
        tokens: How many count.
        read_s: Seconds that reading them took.
        windows: After how many tokens there is a copy of the sliding windows; empty for models without.
    """

    tokens: int
    read_s: float = 0.0
    windows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Check:
    """What the rows of one chunk add up to.

    Args:
        end: Tokens up to its end; it begins where the one before ends.
        sums: Sums of 64-bit words by part: quick, read at opening.
        crcs: CRC-32 by part, for `verify`.
    """

    end: int
    sums: dict[str, int]
    crcs: dict[str, int]


@dataclass(frozen=True)
class Entry:
    """A stored document on disk, as it was when it was looked at.

    Args:
        folder: Where it lies.
        layout: Of its rows.
        state: How far it goes.
    """

    folder: Path
    layout: Layout
    state: State

    @property
    def name(self) -> str:
        """What commands call it."""
        return self.folder.name

    @property
    def rows(self) -> Path:
        return self.folder / ROWS

    @cached_property
    def binding(self) -> Binding:
        return Binding(_of_metadata(self.layout, "binding", dict[str, Any]))

    @property
    def model(self) -> str:
        return self.layout.metadata.get("model", "")

    @property
    def document(self) -> str:
        return self.layout.metadata.get("document", "")

    @property
    def layers(self) -> list[dict[str, Any]]:
        """How each layer's cache is made, first layer first."""
        return _of_metadata(self.layout, "layers", list[_Sliding | _Indexed | _Latent])

    @property
    def bytes(self) -> int:
        """What it takes on the disk."""
        return sum(file.stat().st_blocks * 512 for file in self.folder.iterdir() if file.is_file())

    @property
    def used(self) -> datetime:
        """When it was last written or opened."""
        return datetime.fromtimestamp((self.folder / STATE).stat().st_mtime).astimezone()

    def touch(self) -> None:
        """Marks it as used now. Raises `OSError` on a disk that cannot be written."""
        os.utime(self.folder / STATE)

    def window(self, tokens: int) -> Path:
        """What the sliding windows hold after so many tokens."""
        return window_file(self.folder, tokens)

    def token_ids(self) -> np.ndarray[Any, Any]:
        """int32 `[tokens]`. Raises `OSError` where they cannot be read."""
        with self.rows.open("rb") as file:
            part = self.layout.parts[TOKEN_IDS]
            return np.frombuffer(os.pread(file.fileno(), 4 * self.state.tokens, part.offset), np.int32)


def window_file(folder: Path, tokens: int) -> Path:
    return folder / f"window-{tokens}.safetensors"


def load(folder: Path) -> Entry:
    """An entry as it is on disk now.

    Raises:
        LayoutError: It is damaged; `NewerVersion` where it is of one.
        OSError: It cannot be read, or there is none.
    """
    try:
        plain = read_json(folder / STATE, dict[str, Any], STATE, "it is read again")
        version = int(plain["version"])
        if version > VERSION:
            raise NewerVersion(version)
        state = State(int(plain["tokens"]), float(plain["read_s"]), tuple(plain["windows"]))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        if isinstance(error, LayoutError):
            raise
        raise LayoutError(f"{STATE} is damaged") from error
    handle = os.open(folder / ROWS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        layout = read(handle)
    finally:
        os.close(handle)
    if not 0 < state.tokens <= layout.capacity or not {"binding", "layers"} <= layout.metadata.keys():
        raise LayoutError(f"{STATE} is damaged")
    entry = Entry(folder, layout, state)
    # Looked at now: later nobody expects them to be damaged.
    _ = entry.binding, entry.layers
    return entry


def _of_metadata(layout: Layout, name: str, expected: Any) -> Any:
    try:
        return parse_json(layout.metadata[name], expected, name, "it is read again")
    except ValueError as error:
        raise LayoutError(f"its header is damaged ({error})") from error


def publish(folder: Path, state: State, checks: list[Check]) -> None:
    """Says how far an entry goes, after its rows are on disk. Raises `OSError` where that cannot be written."""
    plain = [{"end": check.end, "sums": check.sums, "crcs": check.crcs} for check in checks]
    write_atomically(folder / CHECKS, json.dumps(plain).encode(), private=True)
    counted = {"version": VERSION, "tokens": state.tokens, "read_s": state.read_s, "windows": list(state.windows)}
    write_atomically(folder / STATE, json.dumps(counted).encode(), private=True)


def checks_of(entry: Entry) -> list[Check]:
    """The sums of every chunk that counts. Raises `LayoutError` where they are damaged, `OSError` as `load`."""
    try:
        plain = read_json(entry.folder / CHECKS, list[dict[str, Any]], CHECKS, "it is read again")
        found = [Check(int(each["end"]), dict(each["sums"]), dict(each["crcs"])) for each in plain]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise LayoutError(f"{CHECKS} is damaged") from error
    # A chunk more may be there: its sums are written before it counts.
    counted = [check for check in found if check.end <= entry.state.tokens]
    ends = [check.end for check in counted]
    names = entry.layout.parts.keys()
    is_whole = all(check.sums.keys() == names and check.crcs.keys() == names for check in counted)
    if not is_whole or ends != sorted(set(ends)) or ends[-1:] != [entry.state.tokens]:
        raise LayoutError(f"{CHECKS} is damaged")
    return counted


def spans(checks: list[Check]) -> Iterator[tuple[int, Check]]:
    """Each chunk with the token that it begins at."""
    begin = 0
    for check in checks:
        yield begin, check
        begin = check.end


def common_length(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def word_sum(data: np.ndarray[Any, Any]) -> int:
    """The sum of the 64-bit words of uint8 `[n]`, modulo 2**64: as quick as memory, and any changed word changes it."""
    whole = data.size // 8 * 8
    total = int(np.add.reduce(data[:whole].view(np.uint64), dtype=np.uint64)) if whole else 0
    return (total + int.from_bytes(data[whole:].tobytes(), "little")) & MASK


def check_of(end: int, rows: dict[str, np.ndarray[Any, Any]]) -> Check:
    """The sums of a chunk's rows, uint8 `[n]` each."""
    sums = {name: word_sum(data) for name, data in rows.items()}
    return Check(end, sums, {name: zlib.crc32(data.data) for name, data in rows.items()})
