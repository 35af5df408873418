"""Ctrl-C and SIGTERM as a request to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dsa.cli.console import note


class Interruption:
    """Whether the user asked to stop, and through which signal."""

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self) -> bool:
        return bool(self.signal)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The first signal lets the running step finish, the second ends at once."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        note("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once, without one")


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Turns Ctrl-C and SIGTERM into a request while the context is open."""
    interruption = Interruption()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, interruption.handle) for number in numbers]
    try:
        yield interruption
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
