"""`dsa store`: what is kept of documents, and removing it."""

from __future__ import annotations

import json as plain_json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dsa.cli import options
from dsa.cli.commands import add_command
from dsa.cli.console import notes, out, print_json
from dsa.cli.waiting import Steps

if TYPE_CHECKING:
    from dsa.store import Damaged, Store
    from dsa.store.entry import Entry

Folder = Annotated[
    Path | None,
    typer.Option("--store", metavar="DIR", help="The store; by default `$DSA_STORE`, else dsa's own."),
]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Entries, or how their names begin.")]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Say which fields keep this model from opening it."),
]


def register(app: typer.Typer) -> None:
    """Adds the group."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="What is kept of documents that were read.")
    add_command(group, "list", list_entries, short_help="What is kept.")
    add_command(group, "show", show, short_help="What one entry is bound to.")
    add_command(group, "verify", verify, short_help="Read everything and compare it with its sums.")
    add_command(group, "remove", remove, short_help="Remove entries.")
    add_command(group, "prune", prune, short_help="Remove what is damaged, and what exceeds a size.")
    app.add_typer(group, name="store", short_help="What is kept of documents that were read.")


def list_entries(store: Folder = None, json: options.PrintJson = False) -> None:
    """List what is kept: for which model, how large, when it was used last."""
    opened = _store(store)
    found = list(opened.look())
    if json:
        print_json({"folder": str(opened.folder), "limit": opened.limit, "entries": [_row(each) for each in found]})
        return
    if not found:
        out.print(f"nothing is kept in {opened.folder}", markup=False, soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "document", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("tokens", "MB", "last used"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in map(_row, found):
        if "damaged" in row:
            table.add_row(row["name"], row["damaged"], "", "", "", "")
        else:
            used = row["used"][:16].replace("T", " ")
            size = f"{row['bytes'] / 1e6:,.1f}"
            table.add_row(row["name"], row["document"], row["model"], f"{row['tokens']:,}", size, used)
    out.print(table)
    held = sum(row.get("bytes", 0) for row in map(_row, found))
    out.print(f"{held / 1e9:,.2f} of {opened.limit / 1e9:,.2f} GB in {opened.folder}", markup=False, soft_wrap=True)


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An entry, or how its name begins.")],
    model: Model = None,
    indexers: options.Indexers = None,
    store: Folder = None,
    json: options.PrintJson = False,
) -> None:
    """Show what an entry is bound to; with --model, in which fields a model differs, so that it cannot open it."""
    entry = _usable(_store(store), name)
    row = {**_row(entry), "read_s": entry.state.read_s, "bound_to": dict(entry.binding.fields)}
    if model is not None:
        row["differences"] = _differences(entry, model, indexers)
    if json:
        print_json(row)
        return
    for key, value in row.items():
        if key == "bound_to":
            out.print("bound to:", markup=False)
            for field, each in value.items():
                out.print(f"  {field}: {plain_json.dumps(each)}", markup=False, soft_wrap=True)
        elif key == "differences":
            said = ", ".join(value) or "nothing: it opens"
            out.print(f"{model} differs in: {said}", markup=False, soft_wrap=True)
        else:
            out.print(f"{key}: {value}", markup=False, soft_wrap=True)


def verify(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Entries; by default all.")] = None,
    store: Folder = None,
    json: options.PrintJson = False,
) -> None:
    """Read all of the entries and compare them with the sums that were written with them."""
    from dsa.store import Damaged

    opened = _store(store)
    found = [opened.entry(each) for each in names] if names else list(opened.look())
    results = []
    for each in found:
        with Steps(keep=False) as steps:
            steps.status(f"Reading {each.name}")
            problem = each.reason if isinstance(each, Damaged) else opened.verify(each)
        results.append({"name": each.name, "problem": problem or None})
        if not json:
            out.print(f"{each.name}: {problem or 'as it was written'}", markup=False, soft_wrap=True)
    if json:
        print_json(results)
    if any(each["problem"] for each in results):
        raise typer.Exit(2)


def remove(names: Names, store: Folder = None) -> None:
    """Remove entries. A process that has one open can use it to its end."""
    opened = _store(store)
    for each in [opened.entry(name) for name in names]:
        used = "; a process has it open, and can use it to its end" if opened.is_in_use(each.name) else ""
        opened.remove(each)
        out.print(f"removed {each.name}{used}", markup=False, soft_wrap=True)


def prune(
    store: Folder = None,
    limit: Annotated[
        float | None,
        typer.Option("--to", min=0, metavar="GB", help="Remove the least recently used above this size."),
    ] = None,
) -> None:
    """Remove what killed processes left, what is damaged, and the least recently used above the size limit.

    What a process has open stays.
    """
    opened = _store(store, None if limit is None else int(limit * 1e9))
    removed = opened.remove_unused()
    out.print(f"removed {len(removed)} entries: {', '.join(removed) or 'none'}", markup=False, soft_wrap=True)


def _store(folder: Path | None, limit: int | None = None) -> Store:
    from dsa.store import Store

    return Store(folder, limit)


def _usable(store: Store, name: str) -> Entry:
    from dsa.store import Damaged

    found = store.entry(name)
    if isinstance(found, Damaged):
        raise ValueError(f"store: the entry {found.name} cannot be used: {found.reason}")
    return found


def _row(each: Entry | Damaged) -> dict[str, Any]:
    from dsa.store import Damaged

    if isinstance(each, Damaged):
        return {"name": each.name, "damaged": each.reason}
    state = each.state
    return {
        "name": each.name,
        "document": each.document,
        "model": each.model,
        "tokens": state.tokens,
        "bytes": each.bytes,
        "used": each.used.isoformat(timespec="seconds"),
    }


def _differences(entry: Entry, model: str, indexers: str | None) -> Sequence[str]:
    from dsa.models.loading import load_model
    from dsa.models.sparse import attach_indexers
    from dsa.store import binding_of

    with notes():
        loaded = load_model(model)
        attach_indexers(loaded, indexers)
    return entry.binding.differences(binding_of(loaded.model))
