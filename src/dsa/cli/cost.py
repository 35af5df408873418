"""`dsa cost`: how many pairs of tokens attention computes, dense and sparse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dsa.cli import options
from dsa.cli.console import note, out

if TYPE_CHECKING:
    from dsa.cost import Pairs


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("cost", short_help="Count what attention computes over a document, dense and sparse.")(cost)


def cost(
    tokens: Annotated[int, typer.Option(metavar="N", help="Length of the document.", show_default=False)],
    top_k: Annotated[int, typer.Option("--top-k", metavar="K", help="Tokens each query reads.", show_default=False)],
    json: options.Json = None,
) -> None:
    """Count the pairs of tokens that attention computes over a document, dense and with DSA.

    Pairs are those of one head in one layer. Counted causally, as language models read, dense attention computes half
    of the square, so that the reduction is about half as large. The indexer's own scores come on top: cheap pairs, but
    as many as dense attention has.

    [bold]Examples[/]

      dsa cost --tokens 100000 --top-k 1000
      dsa cost --tokens 150000 --top-k 3000 --json pairs.json
    """
    from dsa.cost import Pairs
    from dsa.eval.output import check_writable, write_json

    pairs = Pairs(tokens, top_k)
    if json is not None:
        check_writable(json)
    if top_k >= tokens:
        note(f"K = {top_k:,} is not below the document's {tokens:,} tokens: DSA leaves nothing out and is dense here.")
    show(pairs)
    if json is not None:
        write_json(json, pairs.to_json())
        out.print(f"Figures written to {json}", markup=False, soft_wrap=True)


def show(pairs: Pairs) -> None:
    """Prints the pairs as a table."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("pairs a head and layer")
    for heading in ("dense", "DSA", "reduction"):
        table.add_column(heading, justify="right")
    table.add_row("every query with every key", f"{pairs.dense:,}", f"{pairs.dsa:,}", f"{pairs.reduction:,.1f}x")
    table.add_row("causal", f"{pairs.dense_causal:,}", f"{pairs.dsa_causal:,}", f"{pairs.reduction_causal:,.1f}x")
    table.add_row("  scored by the indexer", "-", f"{pairs.scanned_causal:,}", "")
    out.print(table, width=min(80, out.width))
