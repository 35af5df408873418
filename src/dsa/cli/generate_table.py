"""What `dsa generate` says behind the answer: what it took, beside dense attention."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from dsa.cli.console import err
from dsa.cli.cost_table import WIDTH, short

ROWS = (
    ("attention pairs of the prompt", "attention_pairs"),
    ("  scored by the indexers", "index_pairs"),
    ("multiply-adds of the prompt", "prompt_multiply_adds"),
    ("  of attention and indexers", "prompt_multiply_adds_of_attention"),
    ("multiply-adds of a written token", "token_multiply_adds"),
    ("  of attention and indexers", "token_multiply_adds_of_attention"),
    ("bytes moved for a written token", "token_bytes"),
    ("bytes of keys and values", "keys_and_values"),
    ("bytes of index keys", "index_keys"),
)


def show_run(figures: dict[str, Any]) -> None:
    """Prints measured times, and what was counted (`dsa.cost.run.run_cost`) beside dense, to stderr.

    Args:
        figures: `measured` with `read_s` and `token_s`; `counted`, or `None` with `not_counted` saying why.
    """
    measured, read, written = figures["measured"], figures["tokens_read"], figures["tokens_written"]
    each = f", {1e3 * measured['read_s'] / read:.1f} ms each"
    token = measured["token_s"]
    speed = "" if token is None else f", then {1e3 * token:.0f} ms each ({1 / token:.1f} tokens/s)"
    line = f"{read:,} tokens read in {measured['read_s']:.1f} s{each}; {written} written{speed}"
    err.print()
    err.print(line, markup=False, soft_wrap=True)
    counted = figures["counted"]
    if counted is None:
        err.print(f"What dense attention would have taken is not known: {figures['not_counted']}", markup=False)
        return
    err.print(
        "Beside dense attention, counted for this model and these lengths, not measured:", markup=False, soft_wrap=True
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("")
    for heading in ("DSA", "dense", "dense / DSA"):
        table.add_column(heading, justify="right")
    for label, key in ROWS:
        if key in counted["dsa"]:
            dsa, dense = counted["dsa"][key], counted["dense"][key]
            ratio = f"{dense / dsa:,.2f}x" if dsa and dense else ""
            table.add_row(label, short(dsa), short(dense), ratio)
    err.print(table, width=min(WIDTH, err.width))
