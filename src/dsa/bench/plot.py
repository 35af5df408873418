"""Scaling curves of a benchmark's rows, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsa.bench.result import setting


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float, float, float]]]]:
    """Points `(length, median, low, high)` in seconds by plot and contender; only what has two lengths or more."""
    found: dict[str, dict[str, list[tuple[int, float, float, float]]]] = {}
    several = len({setting(row) for row in rows}) > 1
    for row in rows:
        if row.get("length") is None:
            continue
        kind = row["case"].partition(", ")[2]
        title = f"{row['name']}, {kind}" if kind else row["name"]
        if several:
            isa, threads = setting(row)
            title = f"{title} ({isa}, {threads} threads)"
        for name, timing in row["timings"].items():
            if name.startswith(" "):
                continue
            point = (row["length"], timing["median_s"], timing["low_s"], timing["high_s"])
            found.setdefault(title, {}).setdefault(name, []).append(point)
    return {
        title: {name: sorted(points) for name, points in lines.items()}
        for title, lines in found.items()
        if any(len({point[0] for point in points}) > 1 for points in lines.values())
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws seconds over tokens, both logarithmic, one plot per benchmark and data, with the range of the runs.

    Returns:
        Whether there was anything to draw: curves need rows of two lengths.
    """
    found = curves(rows)
    if not found:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(found))
    lines = -(-len(found) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.5 * columns, 4 * lines), squeeze=False, dpi=150)
    places = axes.ravel()
    colors: dict[str, str] = {}
    for place, (title, contenders) in zip(places, found.items(), strict=False):
        for name, points in contenders.items():
            lengths, medians, lows, highs = zip(*points, strict=True)
            color = colors.setdefault(name, f"C{len(colors)}")
            place.plot(lengths, medians, marker="o", markersize=4, label=name, color=color)
            place.fill_between(lengths, lows, highs, alpha=0.2, color=color, linewidth=0)
        ticks = sorted({point[0] for points in contenders.values() for point in points})
        place.set_xscale("log", base=2)
        place.set_yscale("log")
        place.set_xticks(ticks, [_short(tick) for tick in ticks], rotation=45 if len(ticks) > 6 else 0)
        place.set(title=title, xlabel="tokens", ylabel="seconds")
        place.grid(which="major", alpha=0.3)
        place.legend(frameon=False)
    for place in places[len(found) :]:
        place.remove()
    figure.suptitle(_caption(rows), fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _caption(rows: Sequence[Mapping[str, Any]]) -> str:
    where = rows[-1]["environment"]
    isa = where["isa"] or "no compiled kernels"
    return f"{where['machine']}, {where['threads']} threads, {isa}, torch {where['torch']}, commit {where['commit']}"
