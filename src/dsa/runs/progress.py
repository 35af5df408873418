"""How a long step says how far it is, without knowing who draws the bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Begins a step of `total` parts; the context's value is called once per finished part."""

    def __call__(self, label: str, total: int) -> AbstractContextManager[Callable[[], None]]: ...


@contextmanager
def silent(label: str, total: int) -> Iterator[Callable[[], None]]:
    """The `Progress` that shows nothing."""
    yield lambda: None
