"""A stored document as a cache: K and V are mapped, so that only what is selected is ever read.

The mapping is copy-on-write. What a question and its answer add lies in private pages, and nothing that is done to the
cache reaches the file. Index keys are read into memory, because every decoding step scans all of them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from dsa.config import DSAConfig
from dsa.modules import memory
from dsa.modules.cache import IndexedLayer
from dsa.modules.latents import LatentLayer
from dsa.runs.memory import available_memory
from dsa.store.entry import Entry, checks_of, spans, word_sum
from dsa.store.layout import DTYPES, TOKEN_IDS, LayoutError

# Of Linux, where Python before 3.13 has no name for it: pages that nobody writes need no memory kept for them.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

THREADS = 2
"""For reading index keys: one waits for the disk while another adds up."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Opened:
    """A stored document, ready to be asked about.

    Args:
        name: Of the entry.
        cache: With the first `len(token_ids)` tokens in it.
        token_ids: Those.
        read_s: About how long reading them took.
        seconds: How long opening took.
    """

    name: str
    cache: DynamicCache
    token_ids: list[int]
    read_s: float
    seconds: float


@dataclass(frozen=True)
class Added:
    """What a conversation added to an entry.

    Args:
        begin: After how many of its tokens.
        rows: `[n, ...]` by the names that they have in the entry.
        windows: What sliding windows hold at its end, by the names that they have in `Entry.window`.
    """

    begin: int
    rows: dict[str, torch.Tensor]
    windows: dict[str, torch.Tensor]


class Mapping:
    """An entry's file, mapped copy-on-write. As long as it lives, the entry counts as in use."""

    def __init__(self, entry: Entry) -> None:
        """Raises `OSError` where the file cannot be mapped."""
        self.entry = entry
        self._handle = os.open(entry.rows, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # The mapping keeps a descriptor of its own to the same open file, and with it this lock.
            fcntl.flock(self._handle, fcntl.LOCK_SH)
            self.map = mmap.mmap(
                self._handle,
                entry.layout.size,
                flags=mmap.MAP_PRIVATE | NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        except BaseException:
            os.close(self._handle)
            raise
        self._bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def tensor(self, name: str) -> torch.Tensor:
        """A part, `[1, C, ...]`."""
        part, capacity = self.entry.layout.parts[name], self.entry.layout.capacity
        data = self._bytes[part.offset : part.offset + capacity * part.row_bytes]
        return data.view(part.dtype).view(1, capacity, *part.row)

    def read(self, name: str, begin: int, end: int) -> np.ndarray[Any, Any]:
        """Rows as they are in the file, uint8 `[n]`. Raises `OSError` where they cannot be read."""
        part = self.entry.layout.parts[name]
        data = np.empty((end - begin) * part.row_bytes, np.uint8)
        self.read_into(name, begin, data)
        return data

    def read_into(self, name: str, begin: int, data: np.ndarray[Any, Any]) -> None:
        """The same into memory that is there."""
        place, view = self.entry.layout.parts[name].place(begin), data.data
        while view:
            done = os.preadv(self._handle, [view], place)
            if not done:
                raise OSError(f"{self.entry.rows} ends early")
            place, view = place + done, view[done:]

    def advise(self, name: str, tokens: int, advice: int) -> None:
        """Tells the kernel how a part will be read. Advice only: what it does not know changes nothing."""
        part = self.entry.layout.parts[name]
        length = -(-tokens * part.row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.map.madvise(advice, part.offset, length)

    def close(self) -> None:
        """Lets go of the descriptor; the mapping lives as long as its tensors."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def open_entry(entry: Entry, tokens: int, model: Any, config: DSAConfig, added: Added | None = None) -> Opened:
    """Opens the first tokens of an entry.

    Args:
        entry: What matches the model.
        tokens: How many, those that were added included. With sliding windows and nothing added, one of
            `state.windows`.
        model: What will read on.
        config: What it is attached with.
        added: What follows the first `added.begin` of its tokens in place of the others.

    Raises:
        LayoutError: It is damaged.
        OSError: It cannot be read.
    """
    began = time.perf_counter()
    mapped = Mapping(entry)
    try:
        cache = DynamicCache(config=model.config)
        layers = entry.layers
        if len(cache.layers) < len(layers):
            cache.layers = [None] * len(layers)  # type: ignore[list-item]
        resident = _resident(mapped, tokens if added is None else added.begin)
        windows = _windows(entry, tokens) if added is None else added.windows
        _advise(mapped, tokens, config)
        for number, kind in enumerate(layers):
            if kind["kind"] == "sliding":
                cache.layers[number] = _sliding(kind, windows, number, tokens)
                continue
            layer = _empty_layer(kind)
            names = {each: f"layers.{number}.{each}" for each in layer.buffers}
            found = {each: resident.get(name) for each, name in names.items()}
            storages = {each: mapped.tensor(names[each]) if held is None else held for each, held in found.items()}
            if added is not None:
                for each, storage in storages.items():
                    storage[0, added.begin : tokens] = added.rows[names[each]]
            storages = {each: storage.to(model.device) for each, storage in storages.items()}
            layer.adopt(storages, tokens, _DTYPES[kind["dtype"]])
            cache.layers[number] = layer
        held = resident[TOKEN_IDS][0]
        ids = (
            held[:tokens].tolist()
            if added is None
            else [*held[: added.begin].tolist(), *added.rows[TOKEN_IDS].tolist()]
        )
    finally:
        mapped.close()
    share = min(1.0, tokens / entry.state.tokens)
    return Opened(entry.name, cache, ids, entry.state.read_s * share, time.perf_counter() - began)


def _empty_layer(kind: dict[str, Any]) -> IndexedLayer:
    if kind["kind"] == "latent":
        return LatentLayer(
            kind["latent_dim"], kind["index_dtype"], rows_dtype=kind["rows_dtype"], rope_dim=kind["rope_dim"]
        )
    return IndexedLayer(kind["index_dtype"])


def _resident(mapped: Mapping, tokens: int) -> dict[str, torch.Tensor]:
    """Token ids and index keys in memory, `[1, C, ...]`, after their sums were compared."""
    entry = mapped.entry
    names = [name for name in entry.layout.parts if name == TOKEN_IDS or ".index" in name]
    checks = [(begin, check) for begin, check in spans(checks_of(entry)) if begin < tokens]

    def load(name: str) -> torch.Tensor:
        part = entry.layout.parts[name]
        tensor = memory.empty((1, entry.layout.capacity, *part.row), part.dtype)
        data = tensor.view(-1).view(torch.uint8).numpy()
        end = checks[-1][1].end
        mapped.read_into(name, 0, data[: end * part.row_bytes])
        for begin, check in checks:
            if word_sum(data[begin * part.row_bytes : check.end * part.row_bytes]) != check.sums[name]:
                raise LayoutError(f"{name} is damaged between tokens {begin:,} and {check.end:,}")
        return tensor

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(load, names), strict=True))


def _advise(mapped: Mapping, tokens: int, config: DSAConfig) -> None:
    """Where K and V take most of the memory that is left, the kernel reads what is selected and nothing around it.

    Elsewhere its usual reading ahead brings a cold file in with a few large reads.
    """
    large = list(_selected_parts(mapped.entry, config))
    needed = tokens * sum(mapped.entry.layout.parts[name].row_bytes for name in large)
    free = available_memory(torch.device("cpu"))
    if free is not None and needed > free // 2 and hasattr(mmap, "MADV_RANDOM"):
        for name in large:
            mapped.advise(name, tokens, mmap.MADV_RANDOM)


def _selected_parts(entry: Entry, config: DSAConfig) -> Iterator[str]:
    """K and V of the layers that read a selection only."""
    for name in entry.layout.parts:
        if name.endswith((".key", ".value")) and not config.is_dense(int(name.split(".")[1])):
            yield name


def _windows(entry: Entry, tokens: int) -> dict[str, torch.Tensor]:
    if not entry.state.windows:
        return {}
    try:
        return load_file(entry.window(tokens))
    except SafetensorError as error:
        raise LayoutError(f"{entry.window(tokens).name} is damaged") from error


def _sliding(
    kind: dict[str, Any], windows: dict[str, torch.Tensor], number: int, tokens: int
) -> DynamicSlidingWindowLayer:
    layer = DynamicSlidingWindowLayer(kind["window"])
    try:
        key, value = windows[f"layers.{number}.key"], windows[f"layers.{number}.value"]
    except KeyError as error:
        raise LayoutError(f"the sliding window of layer {number} is missing") from error
    layer.lazy_initialization(key, value)
    layer.keys, layer.values, layer.cumulative_length = key, value, tokens
    return layer
