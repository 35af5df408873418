"""`dsa models`: what can be attached, and what is on this disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsa.cli import options
from dsa.cli.commands import add_command
from dsa.cli.console import out, print_json

if TYPE_CHECKING:
    from dsa.models.on_disk import FoundModel

STATES = {
    "trained": "has indexers",
    "born with DSA": "has indexers (born with DSA)",
    "attachable": "takes indexers (dsa train)",
}


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(app, "models", models, short_help="Which models can be attached, and which are on this disk.")


def models(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="FOLDER...", help="Look here, too, and in the folders inside.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Memory of the caches is counted for so many tokens.")
    ] = 32768,
    json: options.PrintJson = False,
) -> None:
    """List the models on this disk, with size and memory, and the families that dsa knows.

    Looks at the default model, the Hub's cache and the folders that are named. Memory is that of weights and caches in
    fp32, as on a CPU; half of it where both are in two bytes.

    [bold]Examples[/]

      dsa models
      dsa models runs/ ~/models --json
    """
    from dsa.models.families import ATTACHABLE, BORN_WITH_DSA
    from dsa.models.on_disk import models_on_disk, suggestions

    found = models_on_disk(folders or [], tokens)
    others = suggestions(tokens)
    attachable, born = sorted(ATTACHABLE), sorted(BORN_WITH_DSA)
    if json:
        rows = [each.to_json() for each in found]
        print_json(
            {"tokens": tokens, "models": rows, "suggested": others, "attachable": attachable, "born_with_dsa": born}
        )
        return
    if found:
        show(found, tokens)
    else:
        out.print("no model is on this disk; the default one comes with `make install`", markup=False)
    out.print(
        "\nThe default model shows the mechanism; over more than a page it does not answer. Larger ones:",
        soft_wrap=True,
    )
    for name, memory in others.items():
        held = "" if memory is None else f" ({memory / 1e9:,.1f} GB in memory)"
        out.print(f"  dsa train {name} --data TEXTS --steps 400 --out RUN{held}", markup=False, soft_wrap=True)
    out.print(f"\nFamilies that take indexers: {', '.join(attachable)}", markup=False, soft_wrap=True)
    out.print(f"Born with DSA: {', '.join(born)}", markup=False, soft_wrap=True)


def show(found: list[FoundModel], tokens: int) -> None:
    """Prints them as a table, then why some cannot be used."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("MODEL", overflow="fold")
    for heading in ("family", "indexers"):
        table.add_column(heading)
    for heading in ("GB on disk", "GB in memory"):
        table.add_column(heading, justify="right")
    for each in found:
        memory = "" if each.memory is None else f"{each.memory / 1e9:,.1f}"
        table.add_row(each.name, each.model_type, STATES.get(each.state, "no"), f"{each.bytes / 1e9:,.2f}", memory)
    out.print(table)
    out.print(f"In memory: weights and caches of {tokens:,} tokens, in fp32.", markup=False, soft_wrap=True)
    for each in found:
        if each.reason:
            out.print(f"{each.name}: {each.reason}", markup=False, soft_wrap=True)
