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
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title=f"K = {result['top_k']:,}")
    table.add_column("")
    for heading in ("perplexity", "ratio to dense, 95 %", "mass kept", "top-k recall"):
        table.add_column(heading, justify="right")
    losses, mass = result.get("perplexity", {}), result.get("mass", {"kept": {}, "recall": {}})
    for name in dict.fromkeys([*losses, *mass["kept"]]):
        table.add_row(
            HEADINGS.get(name, name),
            f"{losses[name]['perplexity']:.3f}" if name in losses else "",
            "{ratio:.4f} ({low:.4f}-{high:.4f})".format(**losses[name]) if name in losses else "",
            f"{mass['kept'][name]:.3f}" if name in mass["kept"] else "",
            f"{mass['recall'][name]:.3f}" if name in mass["recall"] else "",
        )
    if table.row_count:
        console.print(table, width=width)
    for row in result.get("needles", []):
        together = row["cells"][-1]
        console.print(
            f"Needles in {row['length']:,} tokens: {row['reader']} finds {together['found']:.2f}, "
            f"dense {together['found_dense']:.2f} of {together['asked']}",
            width=width,
        )
    for reader, row in result.get("agreement", {}).items():
        console.print(
            f"Greedy continuations, {reader}: {row['top1']:.3f} of the dense model's tokens are its first choice, the "
            f"first {row['until_divergence']:.1f} of {row['new_tokens']} in a row",
            width=width,
        )
    for suspect in result.get("suspect_layers", []):
        console.print(
            "Layer {layer:.0f} stands out: its indexer keeps {share:.3f} of what the oracle keeps, the median layer "
            "{median:.3f}. Retrain it, or leave it dense.".format(**suspect),
            width=width,
        )
