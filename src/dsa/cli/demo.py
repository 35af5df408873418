"""`dsa demo` and the comparison that `dsa eval` shares with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dsa.cli import options
from dsa.cli.commands import add_command
from dsa.cli.console import notes, out
from dsa.cli.waiting import Steps

DEMO_TOP_K = 1024


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model, a text, and how the model reads it sparsely; fields as the options of the same names."""

    model: str
    file: Path | None = None
    tokens: int | None = None
    top_k: int | None = None
    local: int | None = None
    indexers: str | None = None
    json: Path | None = None
    threads: int | None = None
    device: str | None = None
    rope_scaling: str | None = None
    cache: str | None = None
    index_dtype: str | None = None
    kv_dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of `dsa demo`."""

    model: Annotated[str, typer.Option("--model", metavar="MODEL", help=options.MODEL_HELP)] = "default"
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PDF, HTML, Markdown or text to read; by default the Python reference."),
    ] = None
    tokens: options.Tokens = None
    top_k: Annotated[int, typer.Option("--top-k", metavar="K", help="Tokens each query reads.")] = DEMO_TOP_K
    local: options.Local = None
    indexers: options.Indexers = None
    json: options.Json = None
    threads: options.Threads = None
    device: options.Device = None


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(app, "demo", demo, short_help="Read a document dense, with DSA and with a window, and compare.")


def demo(given: DemoOptions) -> None:
    """Read a real document with dense attention, with DSA and with a sliding window, and compare.

    Prints perplexity, the share of the attention that is kept, time and memory, then a short continuation.

    [bold]Examples[/]

      dsa demo
      dsa demo --file thesis.txt --top-k 512
      dsa demo --tokens 4096 --json figures.json
    """
    compare(Comparison(**vars(given)))


def compare(given: Comparison) -> None:
    """Evaluates, prints the table and writes the JSON. What can be refused is refused before the model loads."""
    from dsa.runs.files import check_writable, write_json
    from dsa.runs.inputs import read_document

    if given.json is not None:
        check_writable(given.json)
    with notes(), Steps() as steps:
        document = read_document(given.file, progress=steps)
    import torch

    from dsa.cli.comparison_table import show
    from dsa.eval.evaluation import evaluate
    from dsa.models.extension import scaling_wanted
    from dsa.models.loading import load_model

    if given.threads is not None:
        torch.set_num_threads(given.threads)
    with notes(), Steps() as steps:
        scaling = scaling_wanted(given.rope_scaling, given.indexers)
        loaded = load_model(given.model, device=given.device, status=steps.status, rope_scaling=scaling)
        evaluation = evaluate(
            loaded,
            document,
            tokens=given.tokens,
            indexers=given.indexers,
            cache=given.cache,
            progress=steps,
            **options.overrides(given.top_k, given.local, given.index_dtype, given.kv_dtype),
        )
    if given.json is not None:
        write_json(given.json, evaluation.to_json())
    show(evaluation, out)
    if given.json is not None:
        out.print(f"Figures written to {given.json}", markup=False)
