"""What `dsa generate` says after the answer: what it took, and where it was read."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from dsa.cli.console import err
from dsa.cli.cost_table import WIDTH, short
from dsa.cli.waiting import duration

if TYPE_CHECKING:
    from dsa.documents import SourceDocument
    from dsa.generation.session import Timings
    from dsa.generation.sources import Sources

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


def show_timings(timings: Timings) -> None:
    """One line to stderr: what was read and written, and how long that took."""
    parts = []
    if timings.opened:
        before = f"; reading them took {seconds(timings.opened_read_s)}" if timings.opened_read_s else ""
        parts.append(f"opened {timings.opened:,} tokens in {seconds(timings.open_s)}{before}")
    elif timings.held:
        parts.append(f"{timings.held:,} tokens were read before")
    parts.append(f"{timings.read:,} tokens read in {seconds(timings.read_s)}")
    speed = "" if timings.token_s is None else f" at {1 / timings.token_s:.1f} tokens/s"
    parts.append(f"{timings.written} written{speed}")
    err.print(", ".join(parts), style="dim", markup=False, soft_wrap=True)


def show_sources(sources: Sources, document: SourceDocument, *, passages: bool = False) -> None:
    """Which pages the answer was read from, in one line to stderr, or a passage a line."""
    if passages:
        for each in sources.passages:
            place = "" if each.page is None else f"{document.place(each.page)}, "
            err.print(f"{place}{100 * each.share:.0f} %: {each.text}", style="dim", markup=False, soft_wrap=True)
    elif sources.pages:
        from dsa.generation.sources import pages_in_words

        pages = pages_in_words(sources.pages, document)
        err.print(f"read above all: {pages}", style="dim", markup=False, soft_wrap=True)


def placed(sources: Sources, document: SourceDocument | None) -> dict[str, Any]:
    """Pages and passages as JSON has them; of several files each with its place."""
    found = asdict(sources)
    if document is not None and document.is_joined:
        for each in (*found["pages"], *found["passages"]):
            each["place"] = document.place(each["page"])
    return found


def seconds(value: float) -> str:
    """With as many digits as are worth reading."""
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s" if value < 100 else duration(value)


def show_counted(figures: dict[str, Any]) -> None:
    """Prints what was counted (`dsa.cost.run.run_cost`) next to dense, to stderr.

    Args:
        figures: `counted`, or `None` with `not_counted` saying why.
    """
    counted = figures["counted"]
    if counted is None:
        err.print(f"What dense attention would have taken is not known: {figures['not_counted']}", markup=False)
        return
    err.print(
        "Next to dense attention, counted for this model and these lengths, not measured:", markup=False, soft_wrap=True
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
