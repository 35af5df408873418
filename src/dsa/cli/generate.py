"""`dsa generate`: continue a prompt with sparse attention."""

from __future__ import annotations

import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsa.cli import options
from dsa.cli.console import Steps, err, note, notes

if TYPE_CHECKING:
    import torch

    from dsa.documents import SourceDocument
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
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to write at most.")] = 128,
    top_k: options.TopK = None,
    local: options.Local = None,
    indexers: options.Indexers = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template, as the user's turn.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token; above 0 samples.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="P", help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Make sampling repeatable.")] = None,
    threads: options.Threads = None,
    device: options.Device = None,
    rope_scaling: options.RopeScaling = None,
) -> None:
    """Continue a prompt with sparse attention, streaming to stdout.

    The prompt is --prompt, --file, or what is piped in; with a prompt and a file, the prompt follows the file.

    [bold]Examples[/]

      dsa generate default --prompt "The lightning indexer is"
      dsa generate default --file thesis.txt --prompt "In short," --top-k 1024
      dsa generate default --file report.pdf --ask "Who wrote this report?"
      cat notes.txt | dsa generate default --chat --temperature 0.7 --seed 1
    """
    check_question(ask, prompt, file)
    document, follow = read_prompt(prompt, file)
    import torch

    from dsa.models.loading import attach_indexers, load_model, scaling_wanted

    if threads is not None:
        torch.set_num_threads(threads)
    if seed is not None:
        torch.manual_seed(seed)
    with notes(), Steps() as steps:
        scaling = scaling_wanted(rope_scaling, indexers)
        loaded = load_model(model, device=device, status=steps.status, rope_scaling=scaling)
        ids = prompt_ids(loaded, document, ask, follow=follow, chat=chat or None)
        _note_positions(loaded, ids.shape[1], max_new_tokens)
        report, _ = attach_indexers(loaded, indexers, **options.overrides(top_k, local))
        err.print(str(report), markup=False, soft_wrap=True)
        stream(loaded, ids, steps, max_new_tokens, temperature, top_p)


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


def read_prompt(prompt: str | None, file: Path | None) -> tuple[SourceDocument, str | None]:
    """What is read, from wherever it comes, and what follows it.

    Raises:
        ValueError: No prompt, an empty one, or stdin that is not UTF-8.
        OSError: The file cannot be read.
    """
    from dsa.documents import SourceDocument, read_source

    if file is not None and str(file) != "-":
        with notes(), Steps() as reading:
            return read_source(file, progress=reading), prompt
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


def prompt_ids(
    loaded: LoadedModel, document: SourceDocument, ask: str | None, *, follow: str | None, chat: bool | None
) -> torch.Tensor:
    """Token ids int64 `[1, n]`.

    Raises:
        ValueError: A chat was asked for and the tokenizer has no template.
    """
    import torch

    from dsa.documents.prompt import make_prompt, word_prompt

    tokenizer = loaded.tokenizer
    if tokenizer.is_fast:
        ids = make_prompt(tokenizer, document, ask, follow=follow, chat=chat, least=1).ids
    else:
        words = word_prompt(tokenizer, document.text, ask, follow=follow, chat=chat)
        ids = tokenizer(words.text, add_special_tokens=words.add_special_tokens, verbose=False)["input_ids"]
    return torch.tensor([ids], dtype=torch.int64)


def stream(
    loaded: LoadedModel, ids: torch.Tensor, steps: Steps, max_new_tokens: int, temperature: float, top_p: float
) -> None:
    """Generates to stdout as the tokens come, then says on stderr how fast."""
    from transformers import DynamicCache, TextStreamer

    from dsa.eval.progress import layer_progress
    from dsa.models.loading import quiet_transformers
    from dsa.modules.cache import reserve

    model, tokenizer = loaded.model, loaded.tokenizer
    cache = DynamicCache(config=model.config)
    reserve(cache, ids.shape[1] + max_new_tokens)
    times: list[float] = []
    with ExitStack() as prefill:
        passes = math.ceil(ids.shape[1] / PREFILL_CHUNK)
        prefill.enter_context(layer_progress(model, f"Reading {ids.shape[1]:,} tokens", steps, passes))

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
            model.generate(
                ids.to(model.device),
                past_key_values=cache,
                prefill_chunk_size=PREFILL_CHUNK,
                max_new_tokens=max_new_tokens,
                pad_token_id=padding[0] if isinstance(padding, list) else padding,
                streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                **sampling,
            )
    made = len(times) - 1
    speed = f", then {(made - 1) / (times[-1] - times[1]):.1f} tokens/s" if made > 1 else ""
    err.print(f"{ids.shape[1]:,} tokens read in {times[1] - times[0]:.1f} s, {made} written{speed}", markup=False)


def _note_positions(loaded: LoadedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    import warnings

    trained = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    total = prompt_tokens + max_new_tokens
    if trained is None or total <= trained:
        return
    note(
        f"the prompt has {prompt_tokens:,} tokens and up to {max_new_tokens:,} follow, but {loaded.name} was trained "
        f"on {trained:,} positions: those from {trained:,} on are extrapolated, and quality may fall"
    )
    # attached models say the same when they get there
    warnings.filterwarnings("ignore", POSITIONS_WARNING, UserWarning)
