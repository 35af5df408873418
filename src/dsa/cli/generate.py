"""`dsa generate`: continue a prompt with sparse attention."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsa.cli import options
from dsa.cli.checks import at_most
from dsa.cli.commands import add_command
from dsa.cli.console import notes, quietly
from dsa.cli.generate_table import placed, show_counted, show_sources, show_timings
from dsa.cli.opening import (
    ModelOptions,
    StoreOptions,
    announced,
    check_question,
    model_or_file,
    model_store,
    open_model,
    opened_store,
)
from dsa.cli.waiting import Steps

if TYPE_CHECKING:
    from dsa.documents import SourceDocument
    from dsa.documents.prompt import Prompt
    from dsa.models.extension import Demand
    from dsa.models.loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What is read."""

    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt.")] = None
    file: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Read the prompt from a PDF, HTML, Markdown or text file, or from all of a folder; again for more; "
            "`-` is stdin.",
        ),
    ] = field(default_factory=list)
    ask: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="A question about the file: put after it, in the model's chat template if it has one."
        ),
    ] = None
    pages: options.Pages = None
    tokens: options.FirstTokens = None
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt into the model's chat template, as the user's turn; by default with --ask only.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """What is written."""

    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            callback=at_most("--max-new-tokens", options.MOST_TOKENS),
            help="Tokens to write at most.",
        ),
    ] = 128
    temperature: options.Temperature = 0.0
    top_p: options.TopP = 1.0
    seed: options.Seed = None
    json: options.Json = None
    sources: Annotated[
        bool, typer.Option("--sources", help="Show the passages that the answer was read from, too.")
    ] = False
    stats: Annotated[
        bool, typer.Option("--stats", help="Show what was attached, and what it took next to dense attention.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Write the answer and errors, nothing else.")] = False


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(app, "generate", generate, short_help="Continue a prompt or a long file with sparse attention.")


def generate(reading: PromptOptions, writing: WritingOptions, given: ModelOptions, keeping: StoreOptions) -> None:
    """Continue a prompt with sparse attention, streaming to stdout.

    The prompt is --prompt, --file, or what is piped in; with a prompt and a file, the prompt follows the file. What is
    longer than the model's positions is read with stretched positions. The answer goes to stdout. What it took, and
    the pages that the answer was read from, go to stderr. What was read of a long text is kept on disk, and the next
    question about it begins to be answered at once.

    [bold]Examples[/]

      dsa generate default --prompt "The lightning indexer is"
      dsa generate report.pdf --ask "Who wrote this report?"
      dsa generate default --file thesis.txt --prompt "In short," --top-k 1024
      dsa generate default --file report.pdf --ask "Who wrote this report?" --pages 1-50
      dsa generate default --file minutes/ --file report.pdf --ask "Who signed it?"
      cat notes.txt | dsa generate default --chat --temperature 0.7 --seed 1
    """
    given, files = model_or_file(given, reading.file)
    reading = replace(reading, file=files)
    check_question(reading.ask, reading.prompt, reading.file)
    if writing.json is not None:
        from dsa.runs.files import check_writable

        check_writable(writing.json)
    # The store imports torch: a file that is not there is said before that.
    document, follow = read_prompt(reading.prompt, reading.file, reading.pages)
    store = opened_store(keeping)
    import torch

    from dsa.generation.figures import run_figures
    from dsa.generation.prompt import encode_prompt, kept_tokens
    from dsa.generation.sampling import Sampling
    from dsa.generation.session import Session
    from dsa.generation.sources import Watch
    from dsa.generation.text import pieces

    if writing.seed is not None:
        torch.manual_seed(writing.seed)

    def encode(tokenizer: Any) -> tuple[Prompt, Demand]:
        return encode_prompt(
            tokenizer,
            document,
            writing.max_new_tokens,
            ask=reading.ask,
            tokens=reading.tokens,
            follow=follow,
            chat=reading.chat,
        )

    with quietly(writing.quiet), notes(), Steps(keep=False) as steps:
        loaded, report, prompt = open_model(given, encode, steps, stats=writing.stats, store=store)
        kept = model_store(store, loaded, prompt)
        session = Session(loaded.model, store=kept, document=Path(document.name).name)
        session.open(prompt.ids)
        watch = Watch(report.config, len(prompt.ids))
        progress = announced(loaded, report, session, prompt, steps, ahead=kept is not None)
        keep = kept_tokens(prompt)
        session.read(prompt.ids, new_tokens=writing.max_new_tokens, keep=keep, progress=progress)
        steps.pause()
        with session.using(watch.context):
            tokens = session.write(writing.max_new_tokens, Sampling(writing.temperature, writing.top_p))
            answer = say(pieces(loaded.tokenizer, tokens))
        sources = watch.sources(prompt)
        session.close()
        show_timings(session.timings)
        show_sources(sources, document, passages=writing.sources)
        if writing.stats or writing.json is not None:
            figures = run_figures(loaded, report, session.timings)
            if writing.stats:
                show_counted(figures)
            if writing.json is not None:
                asked = {"model": given.model, "document": document.name, "pages": reading.pages, "ask": reading.ask}
                answered = {"answer": answer, "sources": placed(sources, document)}
                write_figures(writing.json, {**asked, **answered, **figures}, loaded)


def read_prompt(prompt: str | None, files: list[Path], pages: str | None) -> tuple[SourceDocument, str | None]:
    """What is read, from wherever it comes, and what follows it.

    Raises:
        ValueError: No prompt, an empty one, or text that cannot be read.
        OSError: A file cannot be read.
    """
    from dsa.documents import SourceDocument, read_sources, read_stdin
    from dsa.text import checked

    prompt = None if prompt is None else checked(prompt, "prompt:")
    is_stdin = [str(file) for file in files] in ([], ["-"])
    if files or (prompt is None and not (sys.stdin and sys.stdin.isatty())):
        with notes(), Steps(keep=False) as reading:
            if is_stdin:
                return read_stdin(progress=reading, pages=pages), prompt
            return read_sources(files, progress=reading, pages=pages), prompt
    if pages is not None:
        raise ValueError("pages: there is no PDF to take pages of; add --file FILE, or leave --pages out")
    if prompt is None or not prompt.strip():
        raise ValueError("the prompt is empty: give --prompt TEXT, --file FILE, or pipe text in")
    return SourceDocument(prompt, "the prompt"), None


def say(answer: Iterable[str]) -> str:
    """Prints an answer to stdout as it comes, and returns it whole."""
    said = []
    for piece in answer:
        print(piece, end="", flush=True)
        said.append(piece)
    print(flush=True)
    return "".join(said)


def write_figures(path: Path, figures: dict[str, Any], loaded: LoadedModel) -> None:
    """Writes them as JSON, with the RoPE scaling that was used and the machine."""
    from dsa.models.rope import scaling_of
    from dsa.runs.files import write_json
    from dsa.runs.machine import describe_machine

    scaling, machine = scaling_of(loaded.model.config), describe_machine(loaded.model.device)
    write_json(path, {**figures, "rope_scaling": scaling, "environment": machine})
