"""The folder with all stored documents: finding, keeping, verifying and removing them.

    entries/NAME/    one document (`dsa.store.entry`)
    locks/           one for each entry that is being written

A stored document is a readable document: folders are 0700 and files 0600.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from dsa.models.default_model import cache_dir
from dsa.store.binding import Binding
from dsa.store.entry import ROWS, STATE, Entry, checks_of, common_length, load, spans
from dsa.store.layout import LayoutError, NewerVersion
from dsa.store.opening import Mapping
from dsa.store.recording import Recorder, Unkept, metadata_of, start
from dsa.store.tails import DAMAGED as DAMAGED_TAIL
from dsa.store.tails import Tail, tails_of, write_tail

SHARE_OF_DISK = 0.5
"""Of the disk that is free or held by the store, what the store may take where nobody says otherwise."""

REMOVED = ".removed-"
DAMAGED = ".damaged-"


def default_folder() -> Path:
    """`$DSA_STORE`, else `store` next to the converted models in the user's cache directory."""
    if own := os.environ.get("DSA_STORE"):
        return Path(own).expanduser()
    return cache_dir() / "store"


@dataclass(frozen=True)
class Damaged:
    """An entry that cannot be used.

    Args:
        name: Of the entry.
        reason: Why.
        folder: Where it lies.
        is_newer: Whether a newer version of this library wrote it, so that nothing is wrong with it.
    """

    name: str
    reason: str
    folder: Path
    is_newer: bool = False

    @property
    def is_aside(self) -> bool:
        """Whether it was found damaged before."""
        return self.folder.name.startswith(DAMAGED)


class Store:
    """See the module. Making one touches nothing on the disk."""

    def __init__(self, folder: str | Path | None = None, limit: int | None = None) -> None:
        """
        Args:
            folder: Where; by default `default_folder()`. It is made when something is kept.
            limit: Most bytes in all; by default `SHARE_OF_DISK` of what is free.

        Raises:
            NotADirectoryError: There is a file of that name.
        """
        self.folder = default_folder() if folder is None else Path(folder).expanduser()
        self._limit = limit
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"store: {self.folder} is not a directory; give another path, or --no-store")

    @property
    def limit(self) -> int:
        """Most bytes in all."""
        if self._limit is not None:
            return self._limit
        place = next(each for each in (self.folder, *self.folder.absolute().parents) if each.exists())
        return int(SHARE_OF_DISK * (shutil.disk_usage(place).free + sum(entry.bytes for entry in self.entries())))

    def entries(self) -> list[Entry]:
        """Those that can be used, the latest used first. Raises `OSError` where the folder cannot be read."""
        found = [each for each in self.look() if isinstance(each, Entry)]
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def look(self) -> Iterator[Entry | Damaged]:
        """Every entry, by name. Raises `OSError` where the folder cannot be read."""
        if not self._entries.is_dir():
            return
        for folder in sorted(self._entries.iterdir()):
            if folder.name.startswith(DAMAGED):
                yield Damaged(folder.name.removeprefix(DAMAGED), "it was found damaged when it was opened", folder)
            if folder.name.startswith(".") or not (folder / STATE).exists():
                continue
            try:
                yield load(folder)
            except (LayoutError, OSError) as error:
                # Another process may have removed it since.
                if folder.exists():
                    yield Damaged(folder.name, str(error), folder, isinstance(error, NewerVersion))

    def find(self, binding: Binding, ids: Sequence[int]) -> tuple[Entry, int] | None:
        """The entry that begins with the most of these tokens, and how many of them it can be opened with."""
        found = [(entry, usable) for entry, _, usable in self._beginning(binding, ids) if usable]
        return max(found, key=lambda each: each[1], default=None)

    def find_longest(self, binding: Binding, ids: Sequence[int]) -> tuple[Entry, int, Tail | None] | None:
        """The same with what conversations added, where that is more: the tail to open it with.

        Raises:
            DamagedTail: One cannot be read.
        """
        best: tuple[Entry, int, Tail | None] | None = None
        wanted = np.asarray(ids, np.int32)
        for entry, common, usable in self._beginning(binding, ids):
            found: list[tuple[int, Tail | None]] = [(usable, None)]
            found += [(tail.common(wanted, common), tail) for tail in tails_of(entry)]
            tokens, tail = max(found, key=lambda each: each[0])
            if tokens > (0 if best is None else best[1]):
                best = entry, tokens, tail
        return best

    def _beginning(self, binding: Binding, ids: Sequence[int]) -> Iterator[tuple[Entry, int, int]]:
        """Entries that begin with some of these tokens: with how many, and how many they can be opened with."""
        wanted = np.asarray(ids, np.int32)
        for entry in self.entries():
            if entry.binding != binding:
                continue
            try:
                common = common_length(wanted, entry.token_ids())
            except OSError:
                continue
            usable = common
            if entry.state.windows:
                usable = max((place for place in entry.state.windows if place <= common), default=0)
            if common:
                yield entry, common, usable

    def nearest_miss(self, binding: Binding, ids: Sequence[int], least: int) -> tuple[Entry, list[str]] | None:
        """The entry that has these tokens and is bound to something else: to as little as possible, and to what.

        Args:
            binding: Of the model.
            ids: The tokens.
            least: So many of them it begins with at least.
        """
        wanted, best = np.asarray(ids, np.int32), None
        for entry in self.entries():
            fields = entry.binding.differences(binding)
            if not fields or (best is not None and len(fields) >= len(best[1])):
                continue
            try:
                common = common_length(wanted, entry.token_ids())
            except OSError:
                continue
            if common >= least:
                best = entry, fields
        return best

    def keep_tail(self, binding: Binding, ids: Sequence[int], cache: Any, least: int) -> None:
        """Keeps what a conversation added to a stored document.

        Args:
            binding: Of the model.
            ids: All tokens of the cache.
            cache: What was read and written.
            least: Tokens that the stored document has in common with them at least; without one nothing is kept.

        Raises:
            Unkept: There is no room.
            LayoutError: A tail that is there is damaged.
            OSError: The store cannot be written.
        """
        found = self.find_longest(binding, ids)
        if found is None or found[1] == len(ids):
            return
        base = self.find(binding, ids)
        if base is None or base[1] < least or len(ids) > base[0].layout.capacity:
            return
        entry, begin = base
        self._make_room((len(ids) - begin) * entry.layout.token_bytes, entry.name)
        write_tail(entry, begin, ids, cache)

    def recorder(self, binding: Binding, ids: Sequence[int], model: str, document: str) -> Recorder:
        """What keeps these tokens while they are read: in the entry that they begin with, or in a new one.

        Raises:
            Unkept: They are kept already, or by another process right now.
            LayoutError: The entry that would be gone on with is damaged.
            OSError: The store cannot be written.
        """
        found = self.find(binding, ids)
        if found is not None and found[1] >= len(ids):
            raise Unkept("")
        entry = found[0] if found is not None and found[1] == found[0].state.tokens else None
        if entry is not None and len(ids) > entry.layout.capacity:
            entry = None
        name = entry.name if entry is not None else entry_name(binding, ids)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = self._entries / name
        lock = start(folder, self.folder / "locks")
        try:
            if entry is not None:
                # Another process may have gone on with it, or removed it, before the lock was ours.
                entry = load(folder)
                if list(entry.token_ids()) != list(ids[: entry.state.tokens]):
                    raise Unkept("another process keeps another text there")
            replaced = None
            if entry is None and (folder / STATE).exists():
                # Its name says that it has these tokens, and it was not found by them.
                replaced = Damaged(name, "its token ids are damaged", folder)
                self.set_aside(replaced)
            metadata = metadata_of(binding, model, document)
            recorder = Recorder(folder, lock, ids, metadata, lambda needed: self._make_room(needed, name), entry)
            recorder.replaced = replaced
            return recorder
        except BaseException:
            lock.release()
            raise

    def entry(self, name: str) -> Entry | Damaged:
        """The entry whose name begins so.

        Raises:
            ValueError: There is none, or there are several.
        """
        found = [each for each in self.look() if each.name.startswith(name)] if name else []
        if len(found) != 1:
            known = ", ".join(each.name for each in self.look()) or "none"
            raise ValueError(
                f"store: expected the name of one entry, or its beginning, got {name!r}, which {len(found)} have; "
                f"there are: {known}"
            )
        return found[0]

    def verify(self, entry: Entry) -> str:
        """Reads all of an entry and compares it with what was written; what is wrong, or nothing. Raises `OSError`."""
        try:
            checks = checks_of(entry)
            mapped = Mapping(entry)
            try:
                for begin, check in spans(checks):
                    for name in entry.layout.parts:
                        if zlib.crc32(mapped.read(name, begin, check.end).data) != check.crcs[name]:
                            return f"{name} is damaged between tokens {begin:,} and {check.end:,}"
            finally:
                mapped.close()
            missing = [place for place in entry.state.windows if not entry.window(place).exists()]
            for tail in tails_of(entry):
                tail.read(tail.begin + len(tail.ids))
        except LayoutError as error:
            return str(error)
        return f"the sliding windows at {missing[0]:,} tokens are missing" if missing else ""

    def remove(self, entry: Entry | Damaged) -> None:
        """Removes an entry. Whoever has it open keeps what is mapped. Raises `OSError`."""
        gone = self._entries / f"{REMOVED}{uuid.uuid4().hex}"
        entry.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def set_aside(self, entry: Entry | Damaged) -> None:
        """Takes a damaged entry out of use and leaves it where it can be looked at. Raises `OSError`."""
        aside = self._entries / f"{DAMAGED}{entry.name}"
        shutil.rmtree(aside, ignore_errors=True)
        entry.folder.rename(aside)

    def is_in_use(self, name: str) -> bool:
        """Whether a process has it open, or writes it."""
        return in_use(self._entries / name) or self._is_locked(name)

    def remove_unused(self, needed: int = 0) -> list[str]:
        """Removes what a killed process left, what is damaged, and the least recently used until the limit is kept.

        Args:
            needed: Bytes that are to fit as well.

        Returns:
            Names of the entries that were removed. What is in use never is.

        Raises:
            OSError: The store cannot be written.
        """
        self._sweep()
        for tail in [] if needed else self._entries.glob(f"*/{DAMAGED_TAIL}*"):
            tail.unlink(missing_ok=True)
        entries = self.entries()
        held, limit, removed = sum(entry.bytes for entry in entries), self.limit, []
        for entry in reversed(entries):
            if held + needed <= limit:
                break
            if self.is_in_use(entry.name):
                continue
            held -= entry.bytes
            self.remove(entry)
            removed.append(entry.name)
        return removed

    @property
    def _entries(self) -> Path:
        return self.folder / "entries"

    def _make_room(self, needed: int, writing: str) -> None:
        """Raises `Unkept` where an entry does not fit whatever is removed."""
        limit = self.limit
        if needed > limit:
            raise Unkept(
                f"it would take {needed / 1e9:,.2f} GB, and the store in {self.folder} is limited to "
                f"{limit / 1e9:,.2f} GB"
            )
        self.remove_unused(needed)
        held = sum(entry.bytes for entry in self.entries() if entry.name != writing)
        if held + needed > limit:
            raise Unkept(f"the store in {self.folder} is full, and everything in it is in use")

    def _sweep(self) -> None:
        """Removes what was being made or removed when its process ended, and what is damaged."""
        for each in list(self.look()):
            if isinstance(each, Damaged) and not each.is_newer and not self._is_locked(each.name):
                self.remove(each)
        if not self._entries.is_dir():
            return
        for folder in self._entries.iterdir():
            if folder.name.startswith(REMOVED) or (not (folder / STATE).exists() and not self._is_locked(folder.name)):
                shutil.rmtree(folder, ignore_errors=True)

    def _is_locked(self, name: str) -> bool:
        file = self.folder / "locks" / f"{name}.lock"
        if not file.exists():
            return False
        lock = FileLock(file, mode=0o600, thread_local=False)
        with contextlib.suppress(OSError, TimeoutError):
            lock.acquire(timeout=0)
            lock.release()
            return False
        return True


def in_use(folder: Path) -> bool:
    """Whether a process has mapped an entry's rows."""
    try:
        handle = os.open(folder / ROWS, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def entry_name(binding: Binding, ids: Sequence[int]) -> str:
    """The same for the same tokens and model, so that two processes that read one document meet at one lock."""
    tokens = np.asarray(ids, np.int32).tobytes()
    return hashlib.sha256(binding.digest.encode() + tokens).hexdigest()[:12]
