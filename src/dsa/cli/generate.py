"""`dsa generate`: continue a prompt with sparse attention."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsa.cli import options
from dsa.cli.commands import add_command
from dsa.cli.console import notes
from dsa.cli.generate_table import show_run
from dsa.cli.opening import ModelOptions, check_question, open_model
from dsa.cli.waiting import Steps

if TYPE_CHECKING:
    from dsa.documents import SourceDocument
    from dsa.models.extension import Demand
    from dsa.models.loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What is read."""

    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt.")] = None
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Read the prompt from a PDF, HTML, Markdown or text file; `-` is stdin."),
    ] = None
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

    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to write at most.")] = 128
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token; above 0 samples.")
    ] = 0.0
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="P", help="Sample from the likeliest tokens of this mass.")
    ] = 1.0
    seed: Annotated[int | None, typer.Option(metavar="N", help="Make sampling repeatable.")] = None
    json: options.Json = None


@dataclass(frozen=True, kw_only=True)
class GeneratingModel(ModelOptions):
    """Which model, and how it is attached and run."""

    cache: options.Cache = None
    index_dtype: options.IndexDtype = None


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(app, "generate", generate, short_help="Continue a prompt or a long file with sparse attention.")


def generate(reading: PromptOptions, writing: WritingOptions, given: GeneratingModel) -> None:
    """Continue a prompt with sparse attention, streaming to stdout.

    The prompt is --prompt, --file, or what is piped in; with a prompt and a file, the prompt follows the file. What is
    longer than the model's positions is read with stretched positions. The answer goes to stdout. What it took, next
    to dense attention, goes to stderr.

    [bold]Examples[/]

      dsa generate default --prompt "The lightning indexer is"
      dsa generate default --file thesis.txt --prompt "In short," --top-k 1024
      dsa generate default --file report.pdf --ask "Who wrote this report?" --pages 1-50
      cat notes.txt | dsa generate default --chat --temperature 0.7 --seed 1
    """
    check_question(reading.ask, reading.prompt, reading.file)
    if writing.json is not None:
        from dsa.runs.files import check_writable

        check_writable(writing.json)
    document, follow = read_prompt(reading.prompt, reading.file, reading.pages)
    import torch

    from dsa.generation.figures import run_figures
    from dsa.generation.prompt import encode_prompt
    from dsa.generation.sampling import Sampling
    from dsa.generation.session import Session
    from dsa.generation.text import pieces

    if writing.seed is not None:
        torch.manual_seed(writing.seed)

    def encode(tokenizer: Any) -> tuple[list[int], Demand]:
        return encode_prompt(
            tokenizer,
            document,
            writing.max_new_tokens,
            ask=reading.ask,
            tokens=reading.tokens,
            follow=follow,
            chat=reading.chat,
        )

    with notes(), Steps() as steps:
        loaded, report, ids = open_model(given, encode, steps, cache=given.cache, index_dtype=given.index_dtype)
        session = Session(loaded.model)
        session.read(ids, new_tokens=writing.max_new_tokens, progress=steps)
        steps.pause()
        tokens = session.write(writing.max_new_tokens, Sampling(writing.temperature, writing.top_p))
        answer = say(pieces(loaded.tokenizer, tokens))
        figures = run_figures(loaded, report, session.timings)
        show_run(figures)
        if writing.json is not None:
            asked = {"model": given.model, "document": document.name, "pages": reading.pages, "ask": reading.ask}
            write_figures(writing.json, {**asked, "answer": answer, **figures}, loaded)


def read_prompt(prompt: str | None, file: Path | None, pages: str | None) -> tuple[SourceDocument, str | None]:
    """What is read, from wherever it comes, and what follows it.

    Raises:
        ValueError: No prompt, an empty one, or text that cannot be read.
        OSError: The file cannot be read.
    """
    from dsa.documents import SourceDocument, read_source, read_stdin
    from dsa.text import checked

    prompt = None if prompt is None else checked(prompt, "prompt:")
    if file is not None or (prompt is None and not (sys.stdin and sys.stdin.isatty())):
        with notes(), Steps() as reading:
            if file is not None and str(file) != "-":
                return read_source(file, progress=reading, pages=pages), prompt
            return read_stdin(progress=reading, pages=pages), prompt
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
