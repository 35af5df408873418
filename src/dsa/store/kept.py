"""The store as one model uses it: what a session opens documents from and keeps them in."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from copy import copy
from typing import Any

from dsa.models.sparse import sparse_report_of
from dsa.store.binding import Binding, binding_of
from dsa.store.entry import Entry
from dsa.store.folder import Damaged, Store
from dsa.store.layout import LayoutError
from dsa.store.opening import Opened, open_entry
from dsa.store.recording import Recorder, Unkept, reason_of
from dsa.store.tails import DamagedTail

logger = logging.getLogger("dsa")

LEAST_TOKENS = 1024
"""Shorter texts are read again sooner than they are worth a place."""

MOST_FIELDS = 3
"""Of those that keep a model from opening an entry, named in a message."""


class ModelStore:
    """See the module.

    Attributes:
        store: The folder.
        binding: Of the model as it was when this was made.
    """

    def __init__(self, store: Store, model: Any, name: str = "", least: int = LEAST_TOKENS) -> None:
        """
        Args:
            store: The folder.
            model: An attached or accelerated model; its weights are read once, to know them again.
            name: What to call the model in lists.
            least: Tokens that a text must have to be kept.

        Raises:
            ValueError: The model is neither attached nor accelerated.
        """
        self.store, self.model, self.name, self.least = store, model, name, least
        self.binding: Binding = binding_of(model)
        self._said: set[str] = set()

    def owned_by(self, owner: str) -> ModelStore:
        """The same store for one of several users: opens what they had kept, and nothing else.

        Args:
            owner: Who; no secret, since it is written into what is kept. `""` is whoever runs the command line.
        """
        owned = copy(self)
        if owner:
            owned.binding = Binding({**self.binding.fields, "owner": owner})
        return owned

    def open(self, ids: Sequence[int], held: int = 0) -> Opened | None:
        """The stored document that begins with the most of these tokens, if more than `held` and worth it.

        A damaged one is removed from use, named in the log, and the next best is tried.
        """
        if len(ids) < self.least:
            return None
        while True:
            try:
                self._set_damaged_aside()
                found = self.store.find_longest(self.binding, ids)
            except DamagedTail as error:
                if not self._set_tail_aside(error):
                    return None
                continue
            except OSError as error:
                self._say(f"the store in {self.store.folder} cannot be read ({error}); the text is read again")
                return None
            if found is None or found[1] <= held or found[1] < min(self.least, len(ids)):
                if not held:
                    self._say_miss(ids)
                return None
            entry, tokens, tail = found
            try:
                added = None if tail is None else tail.read(tokens)
                opened = open_entry(entry, tokens, self.model, sparse_report_of(self.model).config, added)
            except DamagedTail as error:
                if not self._set_tail_aside(error):
                    return None
                continue
            except LayoutError as error:
                if not self._set_aside(entry, str(error)):
                    return None
                continue
            except OSError as error:
                if entry.folder.exists():
                    self._say(f"the stored document {entry.name} cannot be opened ({error}); it is read again")
                else:
                    self._say(f"the stored document {entry.name} was removed meanwhile; it is read again")
                return None
            with contextlib.suppress(OSError):
                entry.touch()
            return opened

    def recorder(self, ids: Sequence[int], document: str = "") -> Recorder | None:
        """What keeps these tokens while they are read; `None` where they are too few, kept already, or cannot be."""
        if len(ids) < self.least:
            return None
        try:
            recorder = self.store.recorder(self.binding, ids, self.name, document)
        except (Unkept, LayoutError, OSError) as error:
            self.not_kept(reason_of(error))
            return None
        if recorder.replaced is not None:
            self._say_damaged(recorder.replaced.name, recorder.replaced.reason)
        return recorder

    def keep_tail(self, ids: Sequence[int], cache: Any) -> None:
        """Keeps what a conversation added to a stored document, so that its next turn is opened, too.

        Args:
            ids: All tokens of the cache.
            cache: What was read and written.
        """
        if len(ids) < self.least:
            return
        try:
            self.store.keep_tail(self.binding, ids, cache, self.least)
        except DamagedTail as error:
            self._set_tail_aside(error)
        except (Unkept, OSError) as error:
            self._say(f"the conversation is not kept: {reason_of(error)}")

    def forget(self, document: str) -> None:
        """Removes what is kept of this owner's document for this model. Raises `OSError`."""
        for entry in self.store.entries():
            if entry.document == document and entry.binding == self.binding:
                self.store.remove(entry)

    def not_kept(self, reason: str) -> None:
        """Says once that a document is not kept, and why."""
        if reason:
            self._say(f"the document is not kept: {reason}")

    def _say_miss(self, ids: Sequence[int]) -> None:
        """Says once why a text that is there cannot be opened: which field of its binding is another."""
        try:
            missed = self.store.nearest_miss(self.binding, ids, min(self.least, len(ids)))
        except OSError:
            return
        if missed is not None:
            entry, fields = missed
            shown = ", ".join(fields[:MOST_FIELDS])
            more = f" and {len(fields) - MOST_FIELDS} more" if len(fields) > MOST_FIELDS else ""
            self._say(
                f"the stored document {entry.name} has this text, but was read with other values of {shown}{more}; "
                "it is read again"
            )

    def _set_damaged_aside(self) -> None:
        """What cannot be opened for any model is named once, and taken out of use."""
        for each in list(self.store.look()):
            if isinstance(each, Damaged) and each.is_newer:
                self._say(f"the stored document {each.name} is left alone: {each.reason}")
            elif isinstance(each, Damaged) and not each.is_aside:
                self._set_aside(each, each.reason)

    def _say_damaged(self, name: str, reason: str) -> None:
        self._say(
            f"the stored document {name} is damaged ({reason}): it is not used any more, and what is asked for is "
            "read again; `dsa store prune` removes it"
        )

    def _set_aside(self, entry: Entry | Damaged, reason: str) -> bool:
        self._say_damaged(entry.name, reason)
        try:
            self.store.set_aside(entry)
        except OSError:
            return False
        return True

    def _set_tail_aside(self, error: DamagedTail) -> bool:
        self._say(f"{error}: a conversation was kept there, it is not used any more, and its turns are read again")
        try:
            error.set_aside()
        except OSError:
            return False
        return True

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning("dsa: %s", message)
