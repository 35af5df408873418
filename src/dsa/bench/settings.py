"""The options of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsa.models.default_model import DEFAULT_MODEL

DATA = ("recorded", "gaussian")


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        quick: Tiny sizes: says whether everything runs, and nothing about speed.
        lengths: Tokens in place of each row's own lengths.
        seconds: Time for the rounds of one row. Contenders that take longer run once.
        data: Where the tensors of prefill come from, out of `DATA`.
        model: The model that tensors are recorded from, and that is measured end to end.
        llama_python: The interpreter that has llama-cpp-python, if it is not this one.
    """

    quick: bool = False
    lengths: tuple[int, ...] | None = None
    seconds: float = 60.0
    data: tuple[str, ...] = DATA
    model: str = DEFAULT_MODEL
    llama_python: str | None = None

    @property
    def budget(self) -> float:
        """Seconds for the rounds of one row."""
        return 0.0 if self.quick else self.seconds

    def lengths_or(self, usual: Sequence[int], quick: Sequence[int]) -> tuple[int, ...]:
        """The lengths to measure at: the user's, or tiny ones, or a row's own."""
        if self.lengths is not None:
            return self.lengths
        return tuple(quick if self.quick else usual)
