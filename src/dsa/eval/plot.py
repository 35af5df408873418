"""Figures of `dsa eval --tasks`, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FORMATS = (".png", ".svg", ".pdf")
INSTALL = "pip install 'dsa-attention[plot]'"


def check_plot(path: Path) -> None:
    """Makes sure, before a long run, that a plot can be drawn into this file.

    Raises:
        ValueError: The name's ending is no format that can be drawn.
        ImportError: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"plot: expected a file name that ends in {', '.join(FORMATS)}, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"plot: drawing needs matplotlib, which is not installed: {INSTALL}") from error


def draw_tasks(result: dict[str, Any], path: Path) -> None:
    """Draws one panel a figure that was measured, of `dsa.eval.tasks.run_tasks`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[Any] = []
    if "perplexity" in result:
        panels.append(_ratios)
    if "mass" in result:
        panels += [_by_layer, _by_position]
    if "needles" in result:
        panels.append(_needles)
    if "agreement" in result:
        panels.append(_agreement)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6 * columns, 4 * lines), squeeze=False, dpi=150)
    for place, panel in zip(axes.ravel(), panels, strict=False):
        panel(place, result)
        place.grid(alpha=0.3)
    for place in axes.ravel()[len(panels) :]:
        place.remove()
    figure.suptitle(f"{result['model']}, K = {result['top_k']:,}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _ratios(place: Any, result: dict[str, Any]) -> None:
    names = [name for name in result["perplexity"] if name != "dense"]
    for number, name in enumerate(names):
        row = result["perplexity"][name]
        errors = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
        place.errorbar([row["ratio"]], [number], xerr=errors, fmt="o", capsize=3, color=f"C{number}")
    place.set_yticks(range(len(names)), names)
    place.invert_yaxis()
    place.axvline(1.0, color="grey", linewidth=1)
    place.set(title="perplexity, ratio to dense", xscale="log")


def _by_layer(place: Any, result: dict[str, Any]) -> None:
    layers = result["mass"]["layers"]
    for name in layers[0]["mass"] if layers else ():
        place.plot([row["layer"] for row in layers], [row["mass"][name] for row in layers], marker=".", label=name)
    for suspect in result["suspect_layers"]:
        place.axvline(suspect["layer"], color="red", alpha=0.4)
    place.set(title="attention kept by layer (red: stands out)", xlabel="layer")
    place.legend(frameon=False, fontsize=7)


def _by_position(place: Any, result: dict[str, Any]) -> None:
    layers = result["mass"]["layers"]
    for name in layers[0]["mass_by_position"] if layers else ():
        rows = [row["mass_by_position"][name] for row in layers]
        means = [sum(values) / len(values) for values in zip(*rows, strict=True)]
        place.plot(range(1, len(means) + 1), means, marker=".", label=name)
    place.set(title="attention kept by position", xlabel="stretch of the evaluated text")
    place.legend(frameon=False, fontsize=7)


def _needles(place: Any, result: dict[str, Any]) -> None:
    by_reader: dict[str, list[tuple[int, float]]] = {}
    for row in result["needles"]:
        together = row["cells"][-1]
        by_reader.setdefault(row["reader"], []).append((row["length"], together["found"]))
        points = by_reader.setdefault("dense", [])
        if row["length"] not in [length for length, _ in points]:
            points.append((row["length"], together["found_dense"]))
    for name, points in by_reader.items():
        place.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    place.set(title="needles found", xlabel="tokens", ylim=(-0.05, 1.05))
    place.legend(frameon=False, fontsize=7)


def _agreement(place: Any, result: dict[str, Any]) -> None:
    rows = result["agreement"]
    halves = [row["top1_half_width"] or 0.0 for row in rows.values()]
    place.errorbar([row["top1"] for row in rows.values()], range(len(rows)), xerr=halves, fmt="o", capsize=3)
    place.set_yticks(range(len(rows)), list(rows))
    place.invert_yaxis()
    place.set(title="first choices that are the dense model's")
