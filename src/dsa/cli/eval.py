"""`dsa eval`: what `dsa demo` measures, on any model and text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsa.cli import options
from dsa.cli.commands import add_command
from dsa.cli.console import notes, out
from dsa.cli.demo import Comparison, compare
from dsa.cli.waiting import Steps

if TYPE_CHECKING:
    from dsa.eval.tasks import NeedleOptions


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """The options of `dsa eval`."""

    model: options.Model = "default"
    file: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="PDF, HTML, Markdown or text; again for more.", show_default=False),
    ]
    tasks: Annotated[
        str, typer.Option(metavar="NAMES", help="`comparison`, or some of `perplexity,mass,needles,agreement`.")
    ] = "comparison"
    tokens: options.Tokens = None
    top_k: options.TopK = None
    local: options.Local = None
    indexers: options.Indexers = None
    json: options.Json = None
    threads: options.Threads = None
    device: options.Device = None
    weights: options.Weights = None
    rope_scaling: options.RopeScaling = None
    cache: options.Cache = None
    index_dtype: options.IndexDtype = None
    kv_dtype: options.KvDtype = None
    needle_kinds: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Needles to plant, or `all`: `single`, `multi-key`, `multi-value`, `variable-tracking`; by default "
            "`single`.",
        ),
    ] = None
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N", help="Tokens of the texts with needles; by default 2048,4096.")
    ] = None
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the tasks' figures: .svg, .png or .pdf.")] = (
        None
    )
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random selection and the needles.")] = 0


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(app, "eval", evaluate, short_help="Measure a model on your own text: the figures of the demo.")


def evaluate(given: EvalOptions) -> None:
    """Measure a model on a text: dense attention, DSA and a sliding window of the same size, next to each other.

    The second half of the text is evaluated, the first half is context. Without --top-k the budget is that of
    the indexers' own configuration. Models born with DSA (DeepSeek-V3.2, GLM-5) are measured with their own
    indexers; dense is then the same model reading all tokens.

    [bold]Examples[/]

      dsa eval default --file thesis.txt --tokens 8192 --json figures.json
      dsa eval Qwen/Qwen3-0.6B --file thesis.txt --indexers runs/qwen
      dsa eval default --file thesis.txt --tokens 32768 --rope-scaling yarn:4
      dsa eval default --file a.txt --file b.txt --tasks perplexity,mass
      dsa eval default --file a.txt --tasks needles --needle-kinds all
    """
    from dsa.text import existing

    for file in given.file:
        existing(file, "file", "a PDF, HTML, Markdown or UTF-8 text file")
    from dsa.eval.tasks import NeedleOptions, parse_kinds, parse_lengths, parse_tasks

    names = parse_tasks(given.tasks)
    for argument, value in (("needle-kinds", given.needle_kinds), ("lengths", given.lengths)):
        if value is not None and "needles" not in names:
            raise ValueError(f"{argument}: only needles have them; add the task: --tasks needles")
    kinds = parse_kinds("single" if given.needle_kinds is None else given.needle_kinds)
    lengths = parse_lengths("2048,4096" if given.lengths is None else given.lengths)
    if names != ["comparison"]:
        measure(given, names, NeedleOptions(lengths, kinds))
        return
    if len(given.file) > 1:
        raise ValueError(f"file: the comparison reads one text, got {len(given.file)}; add --tasks perplexity,mass")
    if given.plot is not None:
        raise ValueError("plot: the comparison is a table; add --tasks perplexity,mass to draw something")
    shared = {name: value for name, value in vars(given).items() if name in Comparison.__dataclass_fields__}
    compare(Comparison(**{**shared, "file": given.file[0]}))


def measure(given: EvalOptions, names: list[str], needles: NeedleOptions) -> None:
    """Runs tasks, prints their tables, writes the JSON and draws the plot."""
    from dsa.eval.plot import draw_tasks
    from dsa.eval.tasks import run_tasks
    from dsa.runs.files import check_writable, write_json
    from dsa.runs.inputs import read_document
    from dsa.runs.plots import check_plot

    if given.json is not None:
        check_writable(given.json)
    if given.plot is not None:
        check_writable(given.plot, "plot")
        check_plot(given.plot)
    with notes(), Steps() as steps:
        documents = [read_document(each, progress=steps) for each in given.file]
    import torch

    from dsa.cli.eval_table import show_tasks
    from dsa.models.extension import scaling_wanted
    from dsa.models.loading import load_model

    if given.threads is not None:
        torch.set_num_threads(given.threads)
    with notes(), Steps() as steps:
        scaling = scaling_wanted(given.rope_scaling, given.indexers)
        loaded = load_model(
            given.model, device=given.device, status=steps.status, rope_scaling=scaling, weights=given.weights
        )
        result = run_tasks(
            loaded,
            documents,
            names,
            tokens=given.tokens,
            top_k=given.top_k,
            local=given.local,
            index_dtype=given.index_dtype,
            kv_dtype=given.kv_dtype,
            cache=given.cache,
            indexers=given.indexers,
            needles=needles,
            seed=given.seed,
            progress=steps,
        )
    if given.json is not None:
        write_json(given.json, result)
    if given.plot is not None:
        draw_tasks(result, given.plot)
    show_tasks(result, out)
    if given.plot is not None:
        out.print(f"Figures drawn to {given.plot}", markup=False, soft_wrap=True)
    if given.json is not None:
        out.print(f"Figures written to {given.json}", markup=False)
