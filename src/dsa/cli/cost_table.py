"""The tables of `dsa cost`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from dsa.cli.console import out

if TYPE_CHECKING:
    from dsa.cost import Pairs

HEADINGS = {"dense": "dense", "dsa": "DSA", "shared": "shared"}
LABELS = {
    "attention_projections": "projections",
    "attention": "attention",
    "indexer_projections": "indexer",
    "index_scan": "index scan",
    "selection": "selection",
    "feed_forward": "feed-forward",
    "lm_head": "LM head",
    "total": "total",
}
SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
WIDTH = 80


def short(number: float) -> str:
    """A number in three digits and a letter."""
    for scale, letter in SCALES:
        if number >= scale:
            scaled = number / scale
            return f"{scaled:,.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {letter}"
    return f"{number:,.0f}" if number else "-"


def show_pairs(pairs: Pairs) -> None:
    """Prints the pairs of one head in one layer."""
    table = _table("pairs a head and layer", "dense", "DSA", "reduction")
    table.add_row("every query with every key", f"{pairs.dense:,}", f"{pairs.dsa:,}", f"{pairs.reduction:,.1f}x")
    table.add_row("causal", f"{pairs.dense_causal:,}", f"{pairs.dsa_causal:,}", f"{pairs.reduction_causal:,.1f}x")
    table.add_row("  scored by the indexer", "-", f"{pairs.scanned_causal:,}", "")
    _print(table)


def show_model(figures: dict[str, Any]) -> None:
    """Prints what `dsa.cost.model_report` returned."""
    model, names = figures["model"], list(figures["variants"])
    active = model["active_parameters"]
    out.print(
        f"{model['name']}: {model['layers']} layers, {short(model['parameters'])} parameters, {short(active)} of them "
        f"active a token; K = {figures['top_k']:,} in {model['selecting_layers']} layers that select",
        markup=False,
    )
    out.print("MAC: multiply-adds, of the selection comparisons; B: bytes of weights and caches", style="dim")
    titles = (
        ("token", f"one decoded token at {figures['tokens']:,} tokens"),
        ("prompt", f"a prompt of {figures['tokens']:,} tokens"),
        ("request", f"the prompt and {figures['decoded']:,} decoded tokens"),
    )
    for key, title in titles:
        out.print()
        out.print(title, style="bold", markup=False)
        _show_work({name: figures["variants"][name][key] for name in names}, every_part=key != "request")
    _show_memory(figures, names)
    _show_crossing(figures)
    if "money" in figures:
        _show_money(figures["money"])
    out.print()
    out.print("Counted:", style="bold")
    for sentence in figures["assumptions"]:
        out.print(f"- {sentence}", markup=False)


def show_published(figures: dict[str, Any]) -> None:
    """Prints the predicted curve, what it rests on, and the published figures."""
    table = _table("$ per million tokens", "position", "V3.1", "V3.2", "cheaper")
    for point in figures["points"]:
        prices = f"{point['dense']:.3f}", f"{point['dsa']:.3f}"
        table.add_row(point["phase"], f"{point['position']:,}", *prices, f"{point['reduction']:.2f}x")
    _print(table)
    out.print("Held against the report (arXiv 2512.02556, figure 3)", style="bold")
    table = _table("at 128K", "published", "predicted", "off by")
    for row in figures["published"]:
        step = row["positions_a_step"]
        phase = row["phase"] if step is None else f"decode, {step} position{'s' if step > 1 else ''} a step"
        table.add_row(phase, f"about {row['reduction']}x", f"{row['predicted']:.2f}x", f"{row['difference']:+.0%}")
    _print(table)
    out.print("Assumed:", style="bold")
    for sentence in figures["assumptions_in_words"]:
        out.print(f"- {sentence}", markup=False)
    shares = figures["efficiency_of_other_work"]
    out.print(
        f"- from this follows: other work reaches {shares['prefill']:.3f} of FP8 in prefill, {shares['decode']:.3f} in "
        "decoding",
        markup=False,
    )


def _show_work(work: dict[str, Any], every_part: bool) -> None:
    names = list(work)
    table = _table("", *(f"{HEADINGS[name]} MAC" for name in names), *(f"{HEADINGS[name]} B" for name in names))
    for part in work["dense"]:
        rows = [work[name][part] for name in names]
        if part != "total" and not every_part:
            continue
        if part == "selection":
            table.add_row(LABELS[part], *(short(row["comparisons"]) for row in rows), *("-" for _ in rows))
            continue
        cells = [short(row["multiply_adds"]) for row in rows] + [short(row["bytes"]) for row in rows]
        table.add_row(LABELS[part], *cells, style="bold" if part == "total" else None)
    _print(table)


def _show_memory(figures: dict[str, Any], names: list[str]) -> None:
    out.print(f"memory, bytes, at {figures['tokens'] + figures['decoded']:,} tokens", style="bold", markup=False)
    table = _table("", *(HEADINGS[name] for name in names))
    for part in figures["variants"]["dense"]["memory"]:
        cells = (short(figures["variants"][name]["memory"][part]) for name in names)
        table.add_row(part.replace("_", " ").replace("keys and values", "K and V"), *cells)
    _print(table)


def _show_crossing(figures: dict[str, Any]) -> None:
    out.print("DSA needs less from this many tokens on", style="bold")
    found = figures["crossing"]
    table = _table("", *(HEADINGS[name] for name in found))
    labels = {
        "token_multiply_adds": "multiply-adds of a decoded token",
        "token_bytes": "bytes of a decoded token",
        "prompt_multiply_adds": "multiply-adds of a prompt",
    }
    for key, label in labels.items():
        points = (found[name][key] for name in found)
        table.add_row(label, *("never" if point is None else f"{point:,}" for point in points))
    _print(table)


def _show_money(money: dict[str, Any]) -> None:
    out.print(f"a million tokens at {money['price_per_device_hour']:,} for a device-hour", style="bold", markup=False)
    table = _table("", "dense", "DSA", "cheaper")
    for phase in ("prefill", "decode"):
        if phase in money:
            row = money[phase]
            prices = f"{row['dense_per_million']:,.3f}", f"{row['dsa_per_million']:,.3f}"
            table.add_row(phase, *prices, f"{row['reduction']:.2f}x")
    _print(table)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(headings[0])
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def _print(table: Table) -> None:
    out.print(table, width=min(WIDTH, out.width))
