"""Checks of single options while the command line is parsed: before anything is imported or loaded."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

DEFAULT = "default"
WEIGHTS = ("auto", "fp32", "bf16", "int8", "int4")
THREADS_A_CORE = 4
LEAST_MOST_THREADS = 64


def check_model(name: str) -> str:
    """Refuses what can only be a slip of the pen for `default`, before the network is asked for it."""
    slip = name != DEFAULT and difflib.get_close_matches(name.lower(), [DEFAULT], cutoff=0.75)
    if slip and not Path(name).exists():
        raise ValueError(f"there is no model {name!r}; did you mean {DEFAULT}?")
    return name


def check_threads(threads: int | None) -> int | None:
    """Refuses more threads than could be of use here."""
    cores = os.cpu_count() or 1
    most = max(LEAST_MOST_THREADS, THREADS_A_CORE * cores)
    if threads is not None and threads > most:
        raise ValueError(f"--threads: expected at most {most} (this machine has {cores} cores), got {threads:,}")
    return threads


def check_weights(form: str | None) -> str | None:
    """Refuses forms of weights that there are not, before a model is loaded."""
    if form is not None and form not in WEIGHTS:
        raise ValueError(f"--weights: expected one of {', '.join(WEIGHTS)}, got {form!r}")
    return form


def at_most(option: str, most: int) -> Callable[[int | None], int | None]:
    """A check that a number is no larger than what can be meant."""

    def check(value: int | None) -> int | None:
        if value is not None and value > most:
            raise ValueError(f"{option}: expected at most {most:,}, got {value:,}")
        return value

    return check
