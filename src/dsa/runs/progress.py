"""How a long step says how far it is, without knowing who draws the bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Called when one part of a step is finished, or several."""

    def __call__(self, parts: int = 1) -> None: ...


class Progress(Protocol):
    """Begins a step of `total` parts; the context's value is called as they are finished."""

    def __call__(self, label: str, total: int) -> AbstractContextManager[Advance]: ...


@contextmanager
def silent(label: str, total: int) -> Iterator[Advance]:
    """The `Progress` that shows nothing."""
    yield lambda parts=1: None
