"""Taking time: contenders in turn, round after round, and what their times say of each other."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
MOST_ROUNDS = 200
WARM_UP_SHARE = 0.2
"""A first round that takes less than this share of the budget is a warm-up, and is not counted."""


class Disagreement(Exception):
    """Results differ by more than rounding: there is nothing to measure."""


def quantiles(seconds: Sequence[float]) -> dict[str, Any]:
    """What a record keeps of samples: median, lowest, quartiles and highest in seconds, and their number.

    Quartiles are interpolated between the samples next to them, the lowest sample being the quantile 0 and the
    highest 1.
    """
    if len(seconds) > 1:
        lower, _, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    else:
        lower = upper = seconds[0]
    kept = {
        "median_s": statistics.median(seconds),
        "low_s": min(seconds),
        "lower_quartile_s": lower,
        "upper_quartile_s": upper,
        "high_s": max(seconds),
    }
    return {**kept, "runs": len(seconds)}


@dataclass(frozen=True)
class Timing:
    """How long something took, in seconds, each time that it ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Median, quartiles, the range, and how often it ran; not every sample."""
        return quantiles(self.seconds)


@dataclass(frozen=True)
class Figure:
    """A number that a row comes to.

    Args:
        name: What it is.
        value: The number; a median where there is an interval.
        unit: `"x"`, `"%"`, `"MB"`, `"GB/s"`, `"tokens"` ...
        low: Lower end of the interval, if there is one.
        high: Upper end.
        confidence: With which probability the true median lies in the interval, were the runs independent.
    """

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    confidence: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields that say something."""
        return {name: value for name, value in vars(self).items() if value is not None}


def in_turn(
    contenders: Mapping[str, Callable[[], object]],
    *,
    budget: float,
    before: Callable[[], object] | None = None,
    least: int = 1,
    most: int = MOST_ROUNDS,
) -> dict[str, Timing]:
    """Runs all contenders in turn, as many rounds as the budget allows, so that they share the machine's moods.

    Args:
        contenders: What to run, by name.
        budget: Seconds for all of it. One round is run in any case.
        before: Called before each run, outside its time: throws data out of the caches, for example.
        least: Rounds that are run even beyond the budget.
        most: Rounds at most.
    """

    def timed(name: str, run: Callable[[], object]) -> dict[str, float]:
        if before is not None:
            before()
        began = time.perf_counter()
        run()
        return {name: time.perf_counter() - began}

    parts = [functools.partial(timed, name, run) for name, run in contenders.items()]
    return parts_in_turn(parts, budget=budget, least=least, most=most)


def parts_in_turn(
    contenders: Sequence[Callable[[], Mapping[str, float]]], *, budget: float, least: int = 1, most: int = MOST_ROUNDS
) -> dict[str, Timing]:
    """The same for contenders that take the time of their parts themselves, and return seconds by name."""

    def round_of_all() -> dict[str, float]:
        return {name: seconds for run in contenders for name, seconds in run().items()}

    began = time.perf_counter()
    rounds = [round_of_all()]
    first = time.perf_counter() - began
    if first < WARM_UP_SHARE * budget:
        rounds = []
        began = time.perf_counter()
    while len(rounds) < least or (len(rounds) < most and _fits_another(rounds, began, first, budget)):
        rounds.append(round_of_all())
    return {name: Timing(tuple(each[name] for each in rounds)) for name in rounds[0]}


def _fits_another(rounds: Sequence[object], began: float, first: float, budget: float) -> bool:
    spent = time.perf_counter() - began
    return spent + (spent / len(rounds) if rounds else first) <= budget


def ratio(name: str, peer: Timing, own: Timing) -> Figure:
    """How many times longer the peer took: the median over the rounds, with an interval for it."""
    ratios = sorted(theirs / ours for theirs, ours in zip(peer.seconds, own.seconds, strict=True))
    value = statistics.median(ratios)
    if len(ratios) == 1:
        return Figure(name, value, "x")
    low, high, confidence = median_interval(ratios)
    return Figure(name, value, "x", low, high, confidence)


def median_interval(ordered: Sequence[float]) -> tuple[float, float, float]:
    """The narrowest pair of order statistics that holds the median with `CONFIDENCE`, and how surely it does.

    Nothing is assumed of the distribution: each run lies on either side of the median with probability 1/2. With
    few runs the widest pair is less sure than asked for; the third value says how sure.
    """
    count = len(ordered)
    best = 0
    for cut in range(count // 2):
        if _coverage(count, cut) < CONFIDENCE:
            break
        best = cut
    return ordered[best], ordered[count - 1 - best], _coverage(count, best)


def _coverage(count: int, cut: int) -> float:
    outside = sum(math.comb(count, below) for below in range(cut + 1)) / 2**count
    return 1 - 2 * outside
