"""A mean and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

# 97.5 % quantiles of Student's t with 1 to 30 degrees of freedom.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

NORMAL_95 = 1.959964


def student_95(degrees: int) -> float:
    """Half the width of a 95 % interval in standard errors, to three digits."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    # The first two terms of its expansion around the normal quantile.
    z = NORMAL_95
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent observations, at least one, and the half-width of its 95 % interval.

    The half-width is `None` for a single observation, which says nothing of how far others lie from it.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, student_95(count - 1) * math.sqrt(variance / count)
