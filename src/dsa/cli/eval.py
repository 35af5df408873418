"""`dsa eval`: what `dsa demo` measures, on any model and text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsa.cli import options
from dsa.cli.demo import compare


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("eval", short_help="Measure a model on your own text: the figures of the demo.")(evaluate)


def evaluate(
    model: options.Model,
    file: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text to read.", show_default=False)],
    tokens: options.Tokens = None,
    top_k: options.TopK = None,
    local: options.Local = None,
    indexers: options.Indexers = None,
    json: options.Json = None,
    threads: options.Threads = None,
    device: options.Device = None,
    rope_scaling: options.RopeScaling = None,
) -> None:
    """Measure a model on a text: dense attention beside DSA beside a sliding window of the same size.

    The second half of the text is evaluated, the first half is context. Without --top-k the budget is that of
    the indexers' own configuration.

    [bold]Examples[/]

      dsa eval default --file thesis.txt --tokens 8192 --json figures.json
      dsa eval Qwen/Qwen3-0.6B --file thesis.txt --indexers runs/qwen
      dsa eval default --file thesis.txt --tokens 32768 --rope-scaling yarn:4
    """
    compare(model, file, tokens, top_k, local, indexers, json, threads, device, rope_scaling)
