"""Keeping what is read while it is read: each chunk's rows are written by a thread while the next chunk is computed.

Rows are on disk before they count. What is killed loses at most the chunk that was being written. Where the cache is
larger than memory, its storage is the mapped file from the first chunk on, and pages that were written are given back.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from transformers.cache_utils import DynamicSlidingWindowLayer

from dsa.modules.cache import IndexedLayer
from dsa.modules.latents import LatentLayer
from dsa.runs.files import write_tensors
from dsa.runs.memory import available_memory
from dsa.store import layout
from dsa.store.binding import Binding
from dsa.store.entry import ROWS, Check, Entry, State, check_of, checks_of, load, publish, window_file
from dsa.store.layout import TOKEN_IDS, LayoutError
from dsa.store.opening import Mapping

SHARE_OF_MEMORY = 0.8
"""Of the free memory, what a cache may take before it lies in the file."""


class Unkept(Exception):
    """Why nothing is kept, in a few words."""


class Recorder:
    """Writes one prompt's rows into an entry; see the module.

    Attributes:
        problem: Why no more is kept, once that is so.
        tokens: How many tokens of the entry count by now.
        replaced: The damaged entry whose place the new one takes, as the store describes it.
    """

    def __init__(
        self,
        folder: Path,
        lock: FileLock,
        ids: Sequence[int],
        metadata: dict[str, str],
        make_room: Callable[[int], None],
        entry: Entry | None = None,
    ) -> None:
        """
        Args:
            folder: Of the entry.
            lock: Held until `close`: one process at a time writes an entry.
            ids: The tokens that will be kept, all of them.
            metadata: Of a new entry: `model`, `document`, `binding`.
            make_room: Given how many bytes the entry will take, removes others; raises `Unkept`.
            entry: What is there already and is gone on with; its tokens are the first of `ids`.
        """
        self.folder, self.ids, self.problem = folder, ids, ""
        self.replaced: Any = None
        self._lock, self._metadata, self._make_room = lock, metadata, make_room
        self._entry, self._handle, self._map = entry, -1, None
        self._layout = None if entry is None else entry.layout
        self._checks: list[Check] = [] if entry is None else checks_of(entry)
        self._state = State(0) if entry is None else entry.state
        self._pool = ThreadPoolExecutor(1, "dsa-store")
        self._writing: Future[None] | None = None
        self._mapped: Mapping | None = None
        self._closed = False

    @property
    def tokens(self) -> int:
        return self._state.tokens

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def bytes(self) -> int:
        """What the tokens that count take."""
        return 0 if self._layout is None else self.tokens * self._layout.token_bytes

    def add(self, cache: Any, end: int, seconds: float) -> None:
        """Keeps the cache's tokens up to `end`. Returns before they are written.

        Args:
            cache: With exactly `end` tokens, batch 1. Its storage may be exchanged for mapped one.
            end: At most as many tokens as `ids`.
            seconds: What reading those that are not kept yet took.
        """
        self._wait()
        if self.problem or end <= self.tokens:
            return
        try:
            if self._handle < 0:
                self._begin(cache, end)
            assert self._layout is not None
            storages = storages_of(cache)
            windows = windows_of(cache)
        except (Unkept, OSError) as error:
            self._give_up(error)
            return
        begin = self.tokens
        state = State(end, self._state.read_s + seconds, self._state.windows + ((end,) if windows else ()))
        self._writing = self._pool.submit(self._write, storages, windows, begin, state)
        if self._mapped is not None:
            # Memory is short: no second chunk waits for the disk.
            self._wait()

    def lie_in_file(self, cache: Any, total: int) -> bool:
        """Maps the cache's storage onto the file where `total` tokens of it do not fit into memory; says whether."""
        if self._mapped is not None or self._layout is None or self.problem:
            return self._mapped is not None
        free = available_memory(torch.device("cpu"))
        storages = storages_of(cache)
        if free is None or any(storage.device.type != "cpu" for storage in storages.values()):
            return False
        rows = {name: part for name, part in self._layout.parts.items() if name.endswith((".key", ".value"))}
        if (total - self.tokens) * sum(part.row_bytes for part in rows.values()) < SHARE_OF_MEMORY * free:
            return False
        self._wait()
        if self.problem:
            return False
        self._mapped = Mapping(load(self.folder))
        for number, layer in enumerate(cache.layers):
            if isinstance(layer, IndexedLayer):
                for name, buffer in layer.buffers.items():
                    if f"layers.{number}.{name}" in rows:
                        buffer.replace(self._mapped.tensor(f"layers.{number}.{name}"))
        self._mapped.close()
        return True

    def close(self) -> None:
        """Waits for what is being written, and lets go of the entry."""
        if self._closed:
            return
        self._closed = True
        self._wait()
        self._pool.shutdown()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if not self.tokens:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def _begin(self, cache: Any, end: int) -> None:
        """Makes the entry, or opens the one that is gone on with, and sees to the room."""
        if self._layout is not None and len(self.ids) > self._layout.capacity:
            raise Unkept("the stored document has no room to grow that far")
        if self._layout is None:
            rows: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {TOKEN_IDS: (torch.int32, ())}
            for name, storage in storages_of(cache).items():
                rows[name] = (storage.dtype, tuple(storage.shape[2:]))
            unknown = {row[0] for row in rows.values()} - set(layout.DTYPES.values())
            if unknown:
                raise Unkept(f"a cache of {unknown.pop()} cannot be stored")
            metadata = {**self._metadata, "layers": json.dumps(layers_of(cache))}
            self._layout = layout.plan(rows, layout.capacity_for(len(self.ids)), metadata)
        self._make_room((len(self.ids) - self.tokens) * self._layout.token_bytes)
        if self._entry is not None:
            self._handle = os.open(self._entry.rows, os.O_RDWR | os.O_CLOEXEC)
            return
        # What is there is no entry, or one that was found damaged.
        shutil.rmtree(self.folder, ignore_errors=True)
        # With `parents=True` only the last folder would get the mode.
        self.folder.parent.mkdir(mode=0o700, exist_ok=True)
        self.folder.mkdir(mode=0o700)
        self._handle = layout.create(self.folder / ROWS, self._layout)

    def _write(
        self, storages: dict[str, torch.Tensor], windows: dict[str, torch.Tensor], begin: int, state: State
    ) -> None:
        """In the thread: the rows, what they add up to, and then that they count."""
        assert self._layout is not None
        ids = torch.tensor(self.ids[begin : state.tokens], dtype=torch.int32)
        rows = {TOKEN_IDS: as_bytes(ids)}
        for name, storage in storages.items():
            rows[name] = as_bytes(storage[0, begin : state.tokens])
        for name, data in rows.items():
            write_all(self._handle, data, self._layout.parts[name].place(begin))
        if windows:
            write_tensors(window_file(self.folder, state.tokens), windows, {}, private=True)
        os.fsync(self._handle)
        checks = [*self._checks, check_of(state.tokens, rows)]
        publish(self.folder, state, checks)
        self._checks, self._state = checks, state
        if self._mapped is not None:
            self._give_back(begin, state.tokens)

    def _give_back(self, begin: int, end: int) -> None:
        """Drops private pages whose content is in the file now, but for those that hold rows of another chunk."""
        assert self._layout is not None
        assert self._mapped is not None
        for name, part in self._layout.parts.items():
            if name.endswith((".key", ".value")):
                first = -(-part.place(begin) // mmap.PAGESIZE) * mmap.PAGESIZE
                length = part.place(end) // mmap.PAGESIZE * mmap.PAGESIZE - first
                if length > 0:
                    self._mapped.map.madvise(mmap.MADV_DONTNEED, first, length)

    def _wait(self) -> None:
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.problem = reason_of(error)


def reason_of(error: Exception) -> str:
    """Why something is not kept, in words."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def start(folder: Path, locks: Path) -> FileLock:
    """The lock for writing an entry. Raises `Unkept` where another process writes it, `OSError` where none can be."""
    locks.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(locks / f"{folder.name}.lock", mode=0o600, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Unkept("another process is keeping the same document right now") from None
    return lock


def metadata_of(binding: Binding, model: str, document: str) -> dict[str, str]:
    """What an entry says about itself."""
    return {"binding": binding.to_json(), "model": model, "document": document}


def storages_of(cache: Any) -> dict[str, torch.Tensor]:
    """The storage of every layer that keeps all tokens, `[1, C, ...]`, by its name in the file.

    Raises:
        Unkept: A layer is of a kind that cannot be stored.
    """
    found = {}
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, IndexedLayer):
            for name, buffer in layer.buffers.items():
                if buffer.storage is None or buffer.storage.shape[0] != 1:
                    raise Unkept(f"the cache of layer {number} does not hold one text")
                found[f"layers.{number}.{name}"] = buffer.storage
        elif type(layer) is not DynamicSlidingWindowLayer:
            raise Unkept(f"a cache layer of type {type(layer).__name__} cannot be stored")
    return found


def windows_of(cache: Any) -> dict[str, torch.Tensor]:
    """Copies of what the sliding windows hold now, `[1, G, W, D]`."""
    return {
        f"layers.{number}.{name}": states.to("cpu", copy=True).contiguous()
        for number, layer in enumerate(cache.layers)
        if type(layer) is DynamicSlidingWindowLayer
        for name, states in (("key", layer.keys), ("value", layer.values))
        if states is not None
    }


def layers_of(cache: Any) -> list[dict[str, Any]]:
    """How each layer of a filled cache is made, as plain JSON."""
    found: list[dict[str, Any]] = []
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            found.append({"kind": "sliding", "window": layer.sliding_window})
            continue
        plain = {"kind": "indexed", "index_dtype": layer.index_dtype, "dtype": str(layer.dtype).removeprefix("torch.")}
        if isinstance(layer, LatentLayer):
            plain |= {"kind": "latent", "latent_dim": layer.latent_dim}
            plain |= {"rows_dtype": layer.rows_dtype, "rope_dim": layer.rope_dim}
        found.append(plain)
    return found


def as_bytes(rows: torch.Tensor) -> np.ndarray[Any, Any]:
    """uint8 `[n]`; a view where the rows lie one after another in this machine's memory."""
    return rows.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def write_all(handle: int, data: np.ndarray[Any, Any], place: int) -> None:
    """Raises `OSError` where not all of it could be written."""
    view = data.data
    while view:
        done = os.pwrite(handle, view, place)
        place, view = place + done, view[done:]


__all__ = ["LayoutError", "Recorder", "Unkept", "metadata_of", "start"]
