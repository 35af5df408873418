"""Benchmark rows as a table of at most 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsa.bench.result import setting
from dsa.bench.targets import is_met

WIDTH = 80
NONE = "-"


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints every row: the times, what follows from them, what was checked, and where it ran."""
    width = min(WIDTH, console.width)
    several = len({setting(row) for row in rows}) > 1
    for row in rows:
        console.print()
        console.print(f"[bold]{escape(_title(row, several))}[/]", width=width)
        if row["timings"] or row["figures"]:
            console.print(_table(row), width=width)
        for remark in _remarks(row):
            console.print(remark, width=width, markup=False)
    for place in dict.fromkeys(_place(row["environment"]) for row in rows):
        console.print()
        console.print(place, width=width, markup=False)


def _title(row: Mapping[str, Any], several: bool) -> str:
    title = f"{row['name']}, {row['case']}" if row["case"] else str(row["name"])
    where = row["environment"]
    return f"{title} ({where['isa']}, {where['threads']} thread(s))" if several else title


def _table(row: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("")
    for heading in ("median", "range", "runs", "asked"):
        table.add_column(heading, justify="right")
    for name, timing in row["timings"].items():
        low, median, high = (timing[key] for key in ("low_s", "median_s", "high_s"))
        spread = f"{_duration(low)} - {_duration(high)}" if timing["runs"] > 1 else NONE
        table.add_row(escape(name), _duration(median), spread, str(timing["runs"]), "")
    for figure in row["figures"]:
        table.add_row(
            f"[bold]{escape(figure['name'])}[/]", f"[bold]{_value(figure)}[/]", _interval(figure), "", _target(figure)
        )
    return table


def _remarks(row: Mapping[str, Any]) -> list[str]:
    said = [f"Checked against the reference: {'; '.join(row['checks'])}."] if row["checks"] else []
    levels = {figure["confidence"] for figure in row["figures"] if "confidence" in figure}
    if levels:
        shown = ", ".join(f"{100 * level:.0f} %" for level in sorted(levels))
        said.append(f"Range of a ratio: its median lies there with {shown} confidence, by order statistics.")
    return [*said, *row["notes"]]


def _place(where: Mapping[str, Any]) -> str:
    own = [name for name, taken in where["implementations"].items() if taken != "native"]
    missing = f", in plain torch: {', '.join(own)}" if own else ""
    return (
        f"{where['machine']}, {where['threads']} thread(s), {where['isa'] or 'no compiled kernels'}{missing}; "
        f"torch {where['torch']}, transformers {where['transformers']}, python {where['python']}; "
        f"commit {where['commit'] or 'unknown'}."
    )


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:,.0f} {unit}"
    raise AssertionError


def _value(figure: Mapping[str, Any]) -> str:
    return _number(figure["value"], figure["unit"])


def _number(value: float, unit: str) -> str:
    shown = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return f"{shown}x" if unit == "x" else f"{shown} {unit}"


def _interval(figure: Mapping[str, Any]) -> str:
    if "low" not in figure:
        return NONE
    return f"{_number(figure['low'], figure['unit'])} - {_number(figure['high'], figure['unit'])}"


def _target(figure: Mapping[str, Any]) -> str:
    if "target" not in figure:
        return ""
    words = f"{'>=' if figure['at_least'] else '<='} {_number(figure['target'], figure['unit'])}"
    return f"[green]{words}[/]" if is_met(figure) else f"[red]{words} missed[/]"
