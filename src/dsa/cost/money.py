"""Money for tokens: a price of a device-hour and how many tokens the device reads or writes in a second."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsa.runs.json_files import read_json


def price_per_million(price: float, speed: float) -> float:
    """Price of a million tokens.

    Args:
        price: Of one device for one hour, in any currency; 0 for a device that costs nothing.
        speed: Tokens a second on one device.

    Raises:
        ValueError: A negative price, a speed that is not above zero, or either not a finite number.
    """
    if not (math.isfinite(price) and price >= 0):
        raise ValueError(f"price must be a number of at least 0 for one device-hour, got {price}")
    if not (math.isfinite(speed) and speed > 0):
        raise ValueError(f"speed must be a number above 0, in tokens a second on one device, got {speed}")
    return price / 3600 / speed * 1e6


@dataclass(frozen=True)
class Speeds:
    """Tokens a second on one device, measured or given, of the same model dense and with DSA."""

    dense: float
    dsa: float


def parse_speeds(text: str, argument: str) -> Speeds:
    """Reads `DENSE,DSA`.

    Raises:
        ValueError: Not two numbers above zero.
    """
    words = text.split(",")
    try:
        dense, dsa = (float(word) for word in words)
    except ValueError:
        dense = dsa = math.nan
    if not (math.isfinite(dense) and math.isfinite(dsa) and dense > 0 and dsa > 0):
        raise ValueError(
            f"{argument}: expected two numbers above 0, DENSE,DSA in tokens a second on one device, got {text!r}"
        )
    return Speeds(dense, dsa)


def prices(price: float, speeds: Speeds) -> dict[str, float]:
    """What a million tokens cost, dense and with DSA, and the ratio."""
    dense, dsa = (price_per_million(price, speed) for speed in (speeds.dense, speeds.dsa))
    return {
        "dense_tokens_per_second": speeds.dense,
        "dsa_tokens_per_second": speeds.dsa,
        "dense_per_million": dense,
        "dsa_per_million": dsa,
        "reduction": speeds.dsa / speeds.dense,
    }


@dataclass(frozen=True)
class Measured:
    """Speeds that were measured with a context or prompt of `tokens` tokens."""

    tokens: int
    speeds: Speeds


PHASES = {"prefill": ("SDPA prefill", "DSA prefill"), "decode": ("SDPA token", "DSA token")}
"""What a row of `dsa bench e2e` calls the two contenders' seconds."""

DECODE_ROW = ("SDPA", "DSA")
"""Their names in rows that decode over a cache and nothing else."""


def measured_speeds(path: str | Path, tokens: int) -> dict[str, Measured]:
    """The speeds that `dsa bench e2e --json` measured at the lengths nearest to `tokens`, the newest of them.

    Returns:
        Those of `"prefill"` and `"decode"`, whichever were measured with both dense and DSA.

    Raises:
        ValueError: Not such a file, or nothing in it was measured both ways.
        OSError: It cannot be read.
    """
    found: dict[str, list[Measured]] = {phase: [] for phase in PHASES}
    try:
        remedy = "give what `dsa bench e2e --json` wrote"
        for row in read_json(Path(path).expanduser(), dict[str, Any], f"measured: {path}", remedy)["rows"]:
            for phase, speeds in _speeds_of(row).items():
                found[phase].append(Measured(int(row["length"]), speeds))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"measured: {path} is not what `dsa bench e2e --json` writes ({type(error).__name__}: {error})"
        ) from error
    # Later rows are newer; of equals `min` takes the first.
    nearest = {
        phase: min(reversed(rows), key=lambda measured: abs(measured.tokens - tokens))
        for phase, rows in found.items()
        if rows
    }
    if not nearest:
        raise ValueError(f"measured: {path} has no row that was measured both dense and with DSA; run `dsa bench e2e`")
    return nearest


def _speeds_of(row: Mapping[str, Any]) -> dict[str, Speeds]:
    if not row["length"]:
        return {}
    seconds = {name: timing["median_s"] for name, timing in row["timings"].items()}
    names = {**PHASES, "decode": DECODE_ROW} if row["name"] == "decode" else PHASES
    return {
        phase: Speeds(*((row["length"] if phase == "prefill" else 1) / seconds[each] for each in pair))
        for phase, pair in names.items()
        if all(each in seconds for each in pair)
    }
