"""The length from which on DSA costs less than dense attention.

What a decoded token costs is linear in the tokens it sees between two neighbouring budgets `K` of the model's layers,
and what a prompt costs is quadratic there. So is dense minus DSA: intervals are searched from the top down for the
last length at which DSA does not cost less, and no length is missed in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

LONGEST = 1 << 30
"""Lengths looked at; a saving that begins later is none."""


def crossing_point(saving: Callable[[int], float], breakpoints: Sequence[int], longest: int = LONGEST) -> int | None:
    """The smallest `n` from which on `saving` stays above zero; `None` where it does not up to `longest`.

    Args:
        saving: Dense minus DSA of a length, a polynomial of degree 2 or less on every `(K_i, K_(i+1)]`.
        breakpoints: The `K_i`.
        longest: The last length looked at.
    """
    edges = sorted({0, longest, *(edge for edge in breakpoints if 0 < edge < longest)})
    for below, top in zip(reversed(edges[:-1]), reversed(edges[1:]), strict=True):
        last = _last_without(saving, below + 1, top)
        if last is not None:
            return None if last == longest else last + 1
    return 1


def _last_without(saving: Callable[[int], float], low: int, high: int) -> int | None:
    """The largest `n` of `[low, high]` without a saving, where `saving` is one polynomial of degree 2 or less."""
    if saving(high) <= 0:
        return high
    if high - low < 4:
        return next((n for n in range(high, low - 1, -1) if saving(n) <= 0), None)
    # Nothing but the vertex and the ends can separate lengths with a saving from those without.
    falling = low
    if (vertex := _vertex(saving, low, high)) is not None:
        near = [n for n in range(math.floor(vertex) - 1, math.ceil(vertex) + 2) if low <= n <= high]
        falling = next((n for n in near if saving(n) <= 0), low)
    if saving(falling) > 0:
        return None
    without, saved = falling, high
    while saved - without > 1:
        middle = (without + saved) // 2
        without, saved = (without, middle) if saving(middle) > 0 else (middle, saved)
    return without


def _vertex(saving: Callable[[int], float], low: int, high: int) -> float | None:
    """Where the parabola through three lengths has its lowest point, if that lies between them."""
    middle = (low + high) // 2
    left, right = middle - low, high - middle
    slope_left = (saving(middle) - saving(low)) / left
    slope_right = (saving(high) - saving(middle)) / right
    bend = (slope_right - slope_left) / (left + right)
    if bend <= 0:
        return None
    # The slope at the middle of [low, middle] is `slope_left`; it rises by `2 bend` a token.
    vertex = (low + middle) / 2 - slope_left / (2 * bend)
    return vertex if low < vertex < high else None
