"""Figures of `dsa eval --tasks`, by matplotlib."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

LAYER, STRETCH = "layer", "stretch of the evaluated text"


def draw_tasks(result: dict[str, Any], path: Path) -> None:
    """Draws one panel a figure that was measured, of `dsa.eval.tasks.run_tasks`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    panels: list[Any] = []
    if "perplexity" in result:
        panels.append(_ratios)
    if "mass" in result:
        panels += [_by_layer, _by_position]
    for kind in dict.fromkeys(row["kind"] for row in result.get("needles", [])):
        panels += [partial(_needles_by_length, kind=kind), partial(_needles_by_depth, kind=kind)]
    if "agreement" in result:
        panels.append(_agreement)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6 * columns, 4 * lines), squeeze=False, dpi=150)
    colours = Colours()
    for place, panel in zip(axes.ravel(), panels, strict=False):
        place.grid(alpha=0.3)
        panel(place, result, colours)
        if place.get_xlabel() in (LAYER, STRETCH):
            place.xaxis.set_major_locator(MaxNLocator(integer=True))
    for place in axes.ravel()[len(panels) :]:
        place.remove()
    figure.suptitle(f"{result['model']}, K = {result['top_k']:,}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


class Colours(dict[str, str]):
    """A colour for each method, the same in every panel."""

    def __missing__(self, name: str) -> str:
        return self.setdefault(name, f"C{len(self) % 10}")


def _ratios(place: Any, result: dict[str, Any], colours: Colours) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    names = [name for name in result["perplexity"] if name != "dense"]
    for number, name in enumerate(names):
        row = result["perplexity"][name]
        errors = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
        place.errorbar([row["ratio"]], [number], xerr=errors, fmt="o", capsize=3, color=colours[name])
    place.set_yticks(range(len(names)), names)
    place.invert_yaxis()
    place.axvline(1.0, color="grey", linewidth=1)
    place.set(title="perplexity, ratio to dense", xscale="log")
    # A logarithmic axis would label every minor tick of so short a range.
    place.xaxis.set_major_locator(MaxNLocator(5))
    place.xaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
    place.xaxis.set_minor_formatter(NullFormatter())


def _by_layer(place: Any, result: dict[str, Any], colours: Colours) -> None:
    layers = result["mass"]["layers"]
    for name in layers[0]["mass"] if layers else ():
        numbers, kept = zip(*((row["layer"], row["mass"][name]) for row in layers), strict=True)
        place.plot(numbers, kept, marker=".", label=name, color=colours[name])
    for suspect in result["suspect_layers"]:
        place.axvline(suspect["layer"], color="red", alpha=0.4)
    place.set(title="attention kept by layer (red: stands out)", xlabel=LAYER)
    place.legend(frameon=False, fontsize=7)


def _by_position(place: Any, result: dict[str, Any], colours: Colours) -> None:
    layers = result["mass"]["layers"]
    for name in layers[0]["mass_by_position"] if layers else ():
        rows = [row["mass_by_position"][name] for row in layers]
        means = [sum(values) / len(values) for values in zip(*rows, strict=True)]
        place.plot(range(1, len(means) + 1), means, marker=".", label=name, color=colours[name])
    place.set(title="attention kept by position", xlabel=STRETCH)
    place.legend(frameon=False, fontsize=7)


def _needles_by_length(place: Any, result: dict[str, Any], colours: Colours, kind: str) -> None:
    by_reader: dict[str, list[tuple[int, float, float]]] = {"dense": []}
    for row in result["needles"]:
        if row["kind"] != kind:
            continue
        together = row["cells"][-1]
        half = together["found_half_width"] if row["reader"] == "dsa" else None
        by_reader.setdefault(row["reader"], []).append((row["length"], together["found"], half or 0.0))
        if row["length"] not in [length for length, _, _ in by_reader["dense"]]:
            by_reader["dense"].append((row["length"], together["found_dense"], 0.0))
    for name, points in by_reader.items():
        at, shares, halves = zip(*sorted(points), strict=True)
        bars = halves if any(halves) else None
        place.errorbar(at, shares, yerr=bars, marker="o", capsize=3, label=name, color=colours[name])
    lengths = sorted({length for points in by_reader.values() for length, *_ in points})
    place.set_xticks(lengths, [f"{length:,}" for length in lengths])
    place.set(title=f"{kind} needles found (bar: 95 % interval)", xlabel="tokens", ylim=(-0.05, 1.05))
    place.legend(frameon=False, fontsize=7)


def _needles_by_depth(place: Any, result: dict[str, Any], colours: Colours, kind: str) -> None:
    """What DSA finds as colours, with dense attention's share after it, both in figures."""
    rows = sorted(
        (row for row in result["needles"] if (row["kind"], row["reader"]) == (kind, "dsa")),
        key=lambda row: row["length"],
    )
    columns = [row["cells"][:-1] for row in rows]
    depths = range(len(columns[0]))
    shares = [[cells[depth]["found"] for cells in columns] for depth in depths]
    place.grid(visible=False)
    place.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    for depth in depths:
        for column, cells in enumerate(columns):
            cell = cells[depth]
            text = f"{cell['found']:.2f} / {cell['found_dense']:.2f}"
            colour = "black" if cell["found"] > 0.5 else "white"
            place.text(column, depth, text, ha="center", va="center", fontsize=7, color=colour)
    place.set_xticks(range(len(rows)), [f"{row['length']:,}" for row in rows])
    place.set_yticks(depths, [f"{100 * depth // len(depths)} %" for depth in depths])
    place.set(title=f"{kind} needles found: DSA / dense", xlabel="tokens", ylabel="depth, from")


def _agreement(place: Any, result: dict[str, Any], colours: Colours) -> None:
    rows = result["agreement"]
    for number, (name, row) in enumerate(rows.items()):
        half = [row["top1_half_width"] or 0.0]
        place.errorbar([row["top1"]], [number], xerr=half, fmt="o", capsize=3, color=colours[name])
    place.set_yticks(range(len(rows)), list(rows))
    place.invert_yaxis()
    place.set(title="first choices that are the dense model's")
