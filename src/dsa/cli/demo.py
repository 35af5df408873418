"""`dsa demo` and the comparison that `dsa eval` shares with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsa.cli import options
from dsa.cli.console import Steps, notes, out

DEMO_TOP_K = 1024


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("demo", short_help="Read a document dense, with DSA and with a window, and compare.")(demo)


def demo(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help=options.MODEL_HELP)] = "default",
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PDF, HTML, Markdown or text to read; by default the Python reference."),
    ] = None,
    tokens: options.Tokens = None,
    top_k: Annotated[int, typer.Option("--top-k", metavar="K", help="Tokens each query reads.")] = DEMO_TOP_K,
    local: options.Local = None,
    indexers: options.Indexers = None,
    json: options.Json = None,
    threads: options.Threads = None,
    device: options.Device = None,
) -> None:
    """Read a real document with dense attention, with DSA and with a sliding window, and compare.

    Prints perplexity, the share of the attention that is kept, time and memory, then a short continuation.

    [bold]Examples[/]

      dsa demo
      dsa demo --file thesis.txt --top-k 512
      dsa demo --tokens 4096 --json figures.json
    """
    compare(model, file, tokens, top_k, local, indexers, json, threads, device)


def compare(
    model: str,
    file: Path | None,
    tokens: int | None,
    top_k: int | None,
    local: int | None,
    indexers: str | None,
    json: Path | None,
    threads: int | None,
    device: str | None,
    rope_scaling: str | None = None,
    cache: str | None = None,
    index_dtype: str | None = None,
) -> None:
    """Evaluates, prints the table and writes the JSON. What can be refused is refused before the model loads."""
    from dsa.runs.files import check_writable, write_json
    from dsa.runs.inputs import read_document

    if json is not None:
        check_writable(json)
    with notes(), Steps() as reading:
        document = read_document(file, progress=reading)
    import torch

    from dsa.cli.comparison_table import show
    from dsa.eval.evaluation import evaluate
    from dsa.models.extension import scaling_wanted
    from dsa.models.loading import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    with notes(), Steps() as steps:
        scaling = scaling_wanted(rope_scaling, indexers)
        loaded = load_model(model, device=device, status=steps.status, rope_scaling=scaling)
        evaluation = evaluate(
            loaded,
            document,
            tokens=tokens,
            indexers=indexers,
            cache=cache,
            progress=steps,
            **options.overrides(top_k, local, index_dtype),
        )
    if json is not None:
        write_json(json, evaluation.to_json())
    show(evaluation, out)
    if json is not None:
        out.print(f"Figures written to {json}", markup=False)
