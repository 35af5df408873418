"""Targets that a project sets for figures of `dsa bench`: read from a JSON file, shown next to what was measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsa.runs.json_files import read_json

FORMAT = "dsa bench targets 1"
TEXTS = ("row", "case", "figure")
BOUNDS = ("at_least", "at_most")


@dataclass(frozen=True)
class Target:
    """What one figure should reach.

    Args:
        row: Name of the row, as `--only` knows it.
        case: The row's case, such as `n = 32,768`.
        figure: Name of the figure.
        value: The bound.
        at_least: Whether the figure should reach it, or stay below it.
        shape: What the row's shape must say for the target to count, such as `{"top_k": 1024}`.
    """

    row: str
    case: str
    figure: str
    value: float
    at_least: bool
    shape: Mapping[str, Any]

    def covers(self, row: Mapping[str, Any]) -> bool:
        """Whether it speaks of this row."""
        return (self.row, self.case) == (row["name"], row["case"]) and all(
            name in row["shape"] and row["shape"][name] == value for name, value in self.shape.items()
        )


def read_targets(path: Path, rows: Collection[str]) -> tuple[Target, ...]:
    """The targets of a file.

    Args:
        path: A JSON file: `format`, and `targets` with `row`, `case`, `figure`, one of `at_least` and `at_most`, and
            optionally `shape` each.
        rows: The names of rows that there are.

    Raises:
        OSError: It cannot be read.
        ValueError: It is something else, or an entry is wrong.
    """
    plain = read_json(path, dict[str, Any], f"targets: {path}", "see docs/benchmarks.md")
    if plain.get("format") != FORMAT or not isinstance(plain.get("targets"), list):
        raise ValueError(
            f'targets: expected {{"format": "{FORMAT}", "targets": [...]}} in {path}; see docs/benchmarks.md'
        )
    return tuple(
        _target(entry, f"targets: entry {number} of {path}", rows) for number, entry in enumerate(plain["targets"], 1)
    )


def _target(entry: Any, where: str, rows: Collection[str]) -> Target:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {entry!r}")
    unknown = sorted(set(entry) - {*TEXTS, *BOUNDS, "shape"})
    if unknown:
        raise ValueError(f"{where}: expected {', '.join((*TEXTS, *BOUNDS, 'shape'))}, got {unknown[0]!r}")
    for name in TEXTS:
        if not isinstance(entry.get(name), str):
            raise ValueError(f"{where}: {name}: expected a text, got {entry.get(name)!r}")
    if entry["row"] not in rows:
        raise ValueError(f"{where}: row: expected one of {', '.join(rows)}, got {entry['row']!r}")
    bounds = [name for name in BOUNDS if name in entry]
    if len(bounds) != 1:
        raise ValueError(f"{where}: expected either at_least or at_most, got {' and '.join(bounds) or 'neither'}")
    (bound,) = bounds
    value, shape = entry[bound], entry.get("shape", {})
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {bound}: expected a number, got {value!r}")
    if not isinstance(shape, dict):
        raise ValueError(f"{where}: shape: expected an object, got {shape!r}")
    return Target(entry["row"], entry["case"], entry["figure"], value, bound == "at_least", shape)


def with_targets(row: Mapping[str, Any], targets: Sequence[Target]) -> dict[str, Any]:
    """The row, each of its figures with the target that was set for it; other figures stay as they are."""
    asked = {target.figure: target for target in targets if target.covers(row)}
    figures = [
        {**figure, "target": asked[figure["name"]].value, "at_least": asked[figure["name"]].at_least}
        if figure["name"] in asked
        else figure
        for figure in row["figures"]
    ]
    return {**row, "figures": figures}


def without_figure(row: Mapping[str, Any], targets: Sequence[Target]) -> list[str]:
    """What targets expect of a row that it does not have."""
    names = {figure["name"] for figure in row["figures"]}
    return [target.figure for target in targets if target.covers(row) and target.figure not in names]


def is_met(figure: Mapping[str, Any]) -> bool | None:
    """Whether a figure reaches its target; `None` without one."""
    if "target" not in figure:
        return None
    value, target = figure["value"], figure["target"]
    return bool(value >= target if figure["at_least"] else value <= target)
