"""`dsa generate`: continue a prompt with sparse attention."""

from __future__ import annotations

import functools
import math
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsa.cli import options
from dsa.cli.console import Steps, err, notes
from dsa.cli.generate_table import show_run

if TYPE_CHECKING:
    import torch

    from dsa.documents import SourceDocument
    from dsa.models import AttachReport
    from dsa.models.extension import Demand
    from dsa.models.loading import LoadedModel

PREFILL_CHUNK = 4096
"""Prompt tokens read in one pass: what a layer holds besides the cache stays as small as for a prompt of this size."""

POSITIONS_WARNING = r"\d+ tokens are more than the \d+ positions"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("generate", short_help="Continue a prompt or a long file with sparse attention.")(generate)


def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Read the prompt from a PDF, HTML, Markdown or text file; `-` is stdin."),
    ] = None,
    ask: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="A question about the file: put behind it, in the model's chat template if it has one."
        ),
    ] = None,
    pages: options.Pages = None,
    tokens: options.FirstTokens = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to write at most.")] = 128,
    top_k: options.TopK = None,
    local: options.Local = None,
    indexers: options.Indexers = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt into the model's chat template, as the user's turn; by default with --ask only.",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token; above 0 samples.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="P", help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Make sampling repeatable.")] = None,
    json: options.Json = None,
    threads: options.Threads = None,
    device: options.Device = None,
    rope_scaling: options.Extension = None,
    cache: options.Cache = None,
    index_dtype: options.IndexDtype = None,
) -> None:
    """Continue a prompt with sparse attention, streaming to stdout.

    The prompt is --prompt, --file, or what is piped in; with a prompt and a file, the prompt follows the file. What is
    longer than the model's positions is read with stretched positions. The answer goes to stdout, what it took beside
    dense attention to stderr.

    [bold]Examples[/]

      dsa generate default --prompt "The lightning indexer is"
      dsa generate default --file thesis.txt --prompt "In short," --top-k 1024
      dsa generate default --file report.pdf --ask "Who wrote this report?" --pages 1-50
      cat notes.txt | dsa generate default --chat --temperature 0.7 --seed 1
    """
    check_question(ask, prompt, file)
    if json is not None:
        from dsa.runs.files import check_writable

        check_writable(json)
    document, follow = read_prompt(prompt, file, pages)
    import torch

    from dsa.generation.room import check_room
    from dsa.models.extension import chosen_scaling
    from dsa.models.loading import load_model
    from dsa.models.sparse import attach_indexers

    if threads is not None:
        torch.set_num_threads(threads)
    if seed is not None:
        torch.manual_seed(seed)
    with notes(), Steps() as steps:

        @functools.cache
        def encoded(tokenizer: Any) -> tuple[list[int], Demand]:
            return encode_prompt(tokenizer, document, ask, tokens, follow, chat, max_new_tokens)

        scaling = chosen_scaling(model, rope_scaling, indexers, lambda tokenizer: encoded(tokenizer)[1])
        loaded = load_model(model, device=device, status=steps.status, rope_scaling=scaling)
        # attached models say the same when they get there
        warnings.filterwarnings("ignore", POSITIONS_WARNING, UserWarning)
        ids, demand = encoded(loaded.tokenizer)
        report, _ = attach_indexers(loaded, indexers, cache=cache, **options.overrides(top_k, local, index_dtype))
        check_room(loaded, report.config, demand, PREFILL_CHUNK)
        err.print(str(report), markup=False, soft_wrap=True)
        answer, times = stream(loaded, ids, steps, max_new_tokens, temperature, top_p)
        figures = run_figures(loaded, report, len(ids), times)
        show_run(figures)
        if json is not None:
            asked = {"model": model, "document": document.name, "pages": pages, "ask": ask, "answer": answer}
            write_figures(json, {**asked, **figures}, loaded)


def check_question(ask: str | None, prompt: str | None, file: Path | None) -> None:
    """Whether there is one, and something to ask it about.

    Raises:
        ValueError: The question is empty, there is no file, or a prompt besides.
    """
    if ask is None:
        return
    if not ask.strip():
        raise ValueError("ask: the question is empty; give --ask TEXT, or leave it out to continue the file")
    if file is None:
        raise ValueError("ask: there is no document to ask about; add --file FILE, or give the question as --prompt")
    if prompt is not None:
        raise ValueError("ask: got a prompt too, expected one of them; put all of it into --ask")


def read_prompt(prompt: str | None, file: Path | None, pages: str | None) -> tuple[SourceDocument, str | None]:
    """What is read, from wherever it comes, and what follows it.

    Raises:
        ValueError: No prompt, an empty one, or stdin that is not UTF-8.
        OSError: The file cannot be read.
    """
    from dsa.documents import SourceDocument, read_source

    if file is not None and str(file) != "-":
        with notes(), Steps() as reading:
            return read_source(file, progress=reading, pages=pages), prompt
    if pages is not None:
        raise ValueError("pages: there is no PDF to take pages of; add --file FILE, or leave --pages out")
    if file is not None or (prompt is None and not sys.stdin.isatty()):
        try:
            text, name = sys.stdin.read(), "stdin"
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin is not UTF-8 text ({error.reason}); convert it first") from error
    else:
        text, name, prompt = prompt or "", "the prompt", None
    if not text.strip():
        raise ValueError("the prompt is empty: give --prompt TEXT, --file FILE, or pipe text in")
    return SourceDocument(text, name), prompt


def encode_prompt(
    tokenizer: Any,
    document: SourceDocument,
    ask: str | None,
    tokens: int | None,
    follow: str | None,
    chat: bool | None,
    new: int,
) -> tuple[list[int], Demand]:
    """Token ids, and how many of them are what; the other arguments as in `dsa.documents.prompt.make_prompt`.

    Raises:
        ValueError: A chat was asked for and the tokenizer has no template, or a cut text and it cannot tell where.
    """
    from dsa.documents.prompt import make_prompt, word_prompt
    from dsa.models.extension import Demand

    if tokens is not None or tokenizer.is_fast:
        made = make_prompt(tokenizer, document, ask, tokens=tokens, follow=follow, chat=chat, least=1)
        read = made.parts.count("document")
        return made.ids, Demand(read, len(made.ids) - read, new)
    words = word_prompt(tokenizer, document.text, ask, follow=follow, chat=chat)
    ids = tokenizer(words.text, add_special_tokens=words.add_special_tokens, verbose=False)["input_ids"]
    return ids, Demand(len(ids), 0, new)


def stream(
    loaded: LoadedModel, ids: list[int], steps: Steps, max_new_tokens: int, temperature: float, top_p: float
) -> tuple[str, list[float]]:
    """Generates to stdout as the tokens come.

    Returns:
        The text, and when the prompt was handed over and each token came, in seconds.
    """
    import torch
    from transformers import DynamicCache, TextStreamer

    from dsa.models.decoder import layer_progress
    from dsa.models.quiet import quiet_transformers
    from dsa.modules.cache import reserve

    model, tokenizer = loaded.model, loaded.tokenizer
    cache = DynamicCache(config=model.config)
    reserve(cache, len(ids) + max_new_tokens)
    times: list[float] = []
    with ExitStack() as prefill:
        passes = math.ceil(len(ids) / PREFILL_CHUNK)
        prefill.enter_context(layer_progress(model, f"Reading {len(ids):,} tokens", steps, passes))

        class Streamer(TextStreamer):
            """Ends the prefill's bar at the first new token, so that it does not run into the text."""

            def put(self, value: torch.Tensor) -> None:
                times.append(time.perf_counter())
                if len(times) == 2:
                    prefill.close()
                    steps.pause()
                super().put(value)

        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        end = model.generation_config.eos_token_id
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        with quiet_transformers():
            made = model.generate(
                torch.tensor([ids], device=model.device),
                past_key_values=cache,
                prefill_chunk_size=PREFILL_CHUNK,
                max_new_tokens=max_new_tokens,
                pad_token_id=padding[0] if isinstance(padding, list) else padding,
                streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                **sampling,
            )
    return tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True), times


def run_figures(loaded: LoadedModel, report: AttachReport, read: int, times: list[float]) -> dict[str, Any]:
    """What a run took, as `dsa.cli.generate_table.show_run` shows it, in plain JSON types."""
    from dsa.cost.run import run_cost
    from dsa.generation.room import loaded_shape, storage_of

    written = len(times) - 1
    token_s = (times[-1] - times[1]) / (written - 1) if written > 1 else None
    counted, problem = None, None
    try:
        counted = run_cost(loaded_shape(loaded), report.config, read, written, storage_of(loaded.model))
    except ValueError as error:
        problem = str(error)
    return {
        "tokens_read": read,
        "tokens_written": written,
        "measured": {"read_s": times[1] - times[0], "token_s": token_s},
        "counted": counted,
        "not_counted": problem,
        "config": report.config.to_dict(),
        "indexers_trained": report.trained,
    }


def write_figures(path: Path, figures: dict[str, Any], loaded: LoadedModel) -> None:
    """Writes them as JSON, with the RoPE scaling that was used and the machine."""
    from dsa.models.rope import scaling_of
    from dsa.runs.files import write_json
    from dsa.runs.machine import describe_machine

    scaling, machine = scaling_of(loaded.model.config), describe_machine(loaded.model.device)
    write_json(path, {**figures, "rope_scaling": scaling, "environment": machine})
