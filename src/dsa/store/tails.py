"""What a conversation added after a stored document, so that its next turn reads only its new words.

A tail is a file `tail-*.safetensors` in the folder of an entry: token ids and their rows, `[n, ...]`, by the names that
they have in the entry, and for models with sliding windows what these hold at its end. It begins after some of the
entry's tokens, is short, and is read into private pages of the mapping as a whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dsa.runs.files import write_tensors
from dsa.store.entry import Entry, common_length, word_sum
from dsa.store.layout import TOKEN_IDS, LayoutError
from dsa.store.opening import Added
from dsa.store.recording import as_bytes, storages_of, windows_of

PATTERN = "tail-*.safetensors"
DAMAGED = "damaged-"
FORMAT = "dsa-tail"
WINDOW = "window."
"""What the names of sliding windows begin with."""

MOST = 16
"""Conversations about one document that are kept; the least recently used goes first."""


class DamagedTail(LayoutError):
    """A tail that cannot be used."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path.name} is damaged")
        self.path = path

    def set_aside(self) -> None:
        """Takes it out of use and leaves it where it can be looked at. Raises `OSError`."""
        self.path.rename(self.path.with_name(f"{DAMAGED}{self.path.name}"))


@dataclass(frozen=True)
class Tail:
    """A tail on disk.

    Args:
        path: The file.
        begin: How many of the entry's tokens it follows.
        ids: int32 `[n]`, its own tokens.
        is_whole: Whether it can only be taken to its end, because windows remember nothing else.
    """

    path: Path
    begin: int
    ids: np.ndarray[Any, Any]
    is_whole: bool

    def common(self, wanted: np.ndarray[Any, Any], held: int) -> int:
        """How many of the wanted tokens it can be opened with; 0 where it does not help.

        Args:
            wanted: int32 `[m]`.
            held: How many of them the entry begins with.
        """
        if held < self.begin:
            return 0
        length = common_length(wanted[self.begin :], self.ids)
        return self.begin + length if length and (length == len(self.ids) or not self.is_whole) else 0

    def read(self, tokens: int) -> Added:
        """What is added to the entry to have `tokens` tokens, after sums were compared.

        Raises:
            DamagedTail: It is not what was written.
            OSError: It cannot be read.
        """
        try:
            with safe_open(self.path, "pt") as file:
                sums = json.loads(file.metadata()["sums"])
                found = {name: file.get_tensor(name) for name in sums}
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DamagedTail(self.path) from error
        if any(word_sum(as_bytes(rows)) != sums[name] for name, rows in found.items()):
            raise DamagedTail(self.path)
        with contextlib.suppress(OSError):
            os.utime(self.path)
        windows = {name.removeprefix(WINDOW): found.pop(name) for name in list(found) if name.startswith(WINDOW)}
        return Added(self.begin, {name: rows[: tokens - self.begin] for name, rows in found.items()}, windows)


def tails_of(entry: Entry) -> Iterator[Tail]:
    """Every tail of an entry, the latest used first. Raises `DamagedTail`."""
    for path in sorted(entry.folder.glob(PATTERN), key=_used, reverse=True):
        try:
            with safe_open(path, "pt") as file:
                plain = file.metadata()
                names = json.loads(plain["sums"])
                is_whole = any(name.startswith(WINDOW) for name in names)
                yield Tail(path, int(plain["begin"]), file.get_tensor(TOKEN_IDS).numpy(), is_whole)
        except FileNotFoundError:
            # Another process has a longer one.
            continue
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DamagedTail(path) from error


def write_tail(entry: Entry, begin: int, ids: Sequence[int], cache: Any) -> None:
    """Keeps what a cache holds after the first `begin` tokens, and removes the tails that it takes the place of.

    Args:
        entry: It begins with the first `begin` of `ids`, and has room for all of them.
        begin: See above.
        ids: All tokens of the cache.
        cache: Batch 1.

    Raises:
        OSError: It cannot be written.
        Unkept: The cache cannot be stored.
    """
    rows = {name: storage[0, begin : len(ids)].cpu() for name, storage in storages_of(cache).items()}
    rows = {name: part.contiguous() for name, part in rows.items()}
    own = np.asarray(ids[begin:], np.int32)
    rows[TOKEN_IDS] = torch.from_numpy(own)
    rows |= {f"{WINDOW}{name}": part for name, part in windows_of(cache).items()}
    sums = {name: word_sum(as_bytes(part)) for name, part in rows.items()}
    name = hashlib.sha256(str(begin).encode() + own.tobytes()).hexdigest()[:12]
    path = entry.folder / PATTERN.replace("*", name)
    write_tensors(path, rows, {"format": FORMAT, "begin": str(begin), "sums": json.dumps(sums)}, private=True)
    for place, tail in enumerate(tails_of(entry)):
        # What it holds is held by the new one, or by the entry itself, too.
        is_old = tail.begin + len(tail.ids) <= len(ids) and tail.common(np.asarray(ids, np.int32), begin) == (
            tail.begin + len(tail.ids)
        )
        if tail.path != path and (is_old or place >= MOST):
            tail.path.unlink(missing_ok=True)


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
