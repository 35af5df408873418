"""`dsa read`: reads documents ahead, so that questions about them are answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsa.cli import options
from dsa.cli.commands import ListCommand, add_command
from dsa.cli.console import notes, out
from dsa.cli.interruption import Interruption, interruptible
from dsa.cli.opening import ModelOptions, StoreOptions, announced, open_model, opened_store
from dsa.cli.waiting import Steps

if TYPE_CHECKING:
    from dsa.documents import SourceDocument
    from dsa.documents.prompt import Prompt
    from dsa.models.extension import Demand
    from dsa.store import Store

ANY_QUESTION = "?"
"""The tokens up to the document's last do not depend on the question."""

ROOM_FOR_ANSWER = 128
"""As `dsa generate` has it by default: how far positions are stretched depends on it."""


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """What is read."""

    file: Annotated[
        list[Path],
        typer.Option(
            "--file",
            metavar="FILE...",
            help="PDF, HTML, Markdown or text files; a folder is read as one document.",
            show_default=False,
        ),
    ]
    pages: options.Pages = None
    tokens: options.FirstTokens = None
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Read them for questions in the model's chat template; by default if it has one, as `dsa generate "
            "--ask` does it.",
        ),
    ] = None


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(app, "read", read, short_help="Read documents ahead, and keep them for questions.", cls=ListCommand)


def read(reading: DocumentOptions, given: ModelOptions, keeping: StoreOptions) -> None:
    """Read documents ahead and keep what was read, so that `dsa generate --ask` answers questions about them at once.

    Ctrl-C keeps what was read, and the next call goes on from there; a process that is killed loses a few thousand
    tokens at most. Options that change what is computed must be those of the later question.

    [bold]Examples[/]

      dsa read default --file report.pdf
      dsa read default --file a.pdf b.txt --top-k 1024
    """
    from dsa.documents import read_sources
    from dsa.runs.files import check_folder_writable
    from dsa.text import existing

    if reading.pages is not None and len(reading.file) > 1:
        raise ValueError("pages: expected one file with it; read the others in a call of their own")
    for file in reading.file:
        existing(file, "file", "a document or a folder")
    store = opened_store(keeping)
    if store is None:
        raise ValueError("no-store: there is nothing to read for; leave it out, or name a folder with --store DIR")
    check_folder_writable(store.folder, "store")
    with interruptible() as interruption:
        for file in reading.file:
            with notes(), Steps(keep=False) as steps:
                document = read_sources([file], progress=steps, pages=reading.pages)
                _read_one(document, reading, given, store, interruption, steps)
            if interruption():
                raise typer.Exit(128 + interruption.signal)


def _read_one(
    document: SourceDocument,
    reading: DocumentOptions,
    given: ModelOptions,
    store: Store,
    interruption: Interruption,
    steps: Steps,
) -> None:
    """Reads one document and says what is kept of it.

    Raises:
        OSError: It could not be kept.
    """
    from dsa.generation.prompt import encode_prompt, kept_tokens
    from dsa.generation.session import Session
    from dsa.store import ModelStore
    from dsa.store.kept import LEAST_TOKENS

    def encode(tokenizer: Any) -> tuple[Prompt, Demand]:
        return encode_prompt(
            tokenizer, document, ROOM_FOR_ANSWER, ask=ANY_QUESTION, tokens=reading.tokens, chat=reading.chat
        )

    loaded, report, prompt = open_model(given, encode, steps, store=store)
    if not report.trained:
        raise ValueError(
            "indexers: these are untrained and other ones in every process, so nothing that they read can be used "
            "again; give --indexers PATH, or train some with `dsa train`"
        )
    ids, name = prompt.ids[: kept_tokens(prompt)], Path(document.name).name
    if len(ids) < LEAST_TOKENS:
        out.print(f"{name}: {len(ids):,} tokens are too few to be kept; they are read as quickly", markup=False)
        return
    kept = ModelStore(store, loaded.model, loaded.name)
    found = store.find(kept.binding, ids)
    if found is not None and found[1] == len(ids):
        out.print(f"{name}: {len(ids):,} tokens are kept already ({found[0].name})", markup=False, soft_wrap=True)
        return
    session = Session(loaded.model, stop=interruption, store=kept, document=name)
    before = session.open(ids)
    progress = announced(loaded, report, session, prompt, steps)
    session.read(ids, progress=progress)
    session.close()
    steps.pause()
    if session.kept is None and interruption():
        out.print(f"{name}: stopped before anything of it was kept", markup=False, soft_wrap=True)
        return
    tokens = 0 if session.kept is None else session.kept.tokens
    if session.kept is None or (tokens < len(ids) and not interruption()):
        raise OSError(f"store: {name} could not be kept in {store.folder}; what stood in the way is said above")
    again = f", {before:,} of them before" if before else ""
    of = "" if tokens == len(ids) else f" of {len(ids):,}; the same call goes on from there"
    out.print(
        f"{name}: kept {tokens:,} tokens{again}{of} ({session.kept.name}, {session.kept.bytes / 1e6:,.0f} MB)",
        markup=False,
        soft_wrap=True,
    )
