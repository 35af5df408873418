"""The figures of `dsa eval --tasks` as tables of at most 80 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 80
HEADINGS = {"dense": "dense", "dsa": "DSA", "window": "4 sinks + window", "pattern": "pattern", "blocks": "blocks"}


def show_tasks(result: dict[str, Any], console: Console) -> None:
    """Prints what every selection came to at the same budget, and the layers that stand out."""
    width = min(WIDTH, console.width)
    table = _table(f"K = {result['top_k']:,}", (0, 1, 0, 0))
    losses, mass = result.get("perplexity", {}), result.get("mass", {"kept": {}, "recall": {}})
    headings = ["perplexity", "ratio to dense, 95 %"] if losses else []
    for heading in [*headings, *(["mass kept", "top-k recall"] if mass["kept"] else [])]:
        table.add_column(heading, justify="right")
    for name in dict.fromkeys([*losses, *mass["kept"]]):
        cells = [HEADINGS.get(name, name)]
        if losses:
            row = losses[name]
            cells += [f"{row['perplexity']:.3f}", "{ratio:.4f} ({low:.4f}-{high:.4f})".format(**row)]
        cells += [f"{mass[figure][name]:.3f}" if name in mass[figure] else "" for figure in ("kept", "recall")]
        table.add_row(*cells[: len(table.columns)])
    if table.row_count:
        console.print(table, width=width)
    if result.get("needles"):
        _show_needles(result["needles"], console, width)
    for reader, row in result.get("agreement", {}).items():
        console.print(
            f"Greedy continuations, {reader}: {row['top1']:.3f} of the dense model's tokens are its first choice, the "
            f"first {row['until_divergence']:.1f} of {row['new_tokens']} in a row",
            width=width,
        )
    # The indexers of a model born with DSA are as they were trained.
    advice = "" if result.get("born_with_dsa") else " Retrain it, or leave it dense."
    for suspect in result.get("suspect_layers", []):
        console.print(
            "Layer {layer:.0f} stands out: its indexer keeps {share:.3f} of what the oracle keeps, the median layer "
            "{median:.3f}.".format(**suspect)
            + advice,
            width=width,
        )


def _show_needles(rows: list[dict[str, Any]], console: Console, width: int) -> None:
    """Two tables, kinds and lengths down, readers across: answers found, and their log-probability next to dense's."""
    readers = list(dict.fromkeys(row["reader"] for row in rows))
    by_place: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_place.setdefault((row["kind"], row["length"]), {})[row["reader"]] = row["cells"][-1]
    found = _needle_table("Needles: share of the answers found", ["dense", *readers])
    nearness = _needle_table("Needles: log-probability of an answer less dense attention's, nats", readers)
    for (kind, length), cells in by_place.items():
        shares = [next(iter(cells.values()))["found_dense"], *(cells[reader]["found"] for reader in readers)]
        found.add_row(kind, f"{length:,}", *(f"{share:.2f}" for share in shares))
        nearness.add_row(kind, f"{length:,}", *(_difference(cells[reader], reader == "dsa") for reader in readers))
    for table in (found, nearness):
        console.print()
        console.print(table, width=width)
    console.print(
        "Over the answers that dense attention finds (-: none), with the 95 % interval for DSA; *: the whole interval "
        "lies below zero.",
        width=width,
    )


def _needle_table(title: str, readers: list[str]) -> Table:
    table = _table(title, 0)
    for heading in ("tokens", *("DSA" if reader == "dsa" else reader for reader in readers)):
        table.add_column(heading, justify="right")
    return table


def _table(title: str, padding: int | tuple[int, int, int, int]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=padding, header_style="bold", title=title
    )
    table.add_column("")
    return table


def _difference(cell: dict[str, Any], with_interval: bool) -> str:
    difference, half = cell["difference"], cell["half_width"]
    if difference is None:
        return "-"
    interval = f"±{half:.2f}" if with_interval and half is not None else ""
    return f"{difference:+.2f}{interval}{'*' if half is not None and difference + half < 0 else ''}"
