"""`dsa eval`: what `dsa demo` measures, on any model and text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsa.cli import options
from dsa.cli.console import Steps, notes, out
from dsa.cli.demo import compare


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("eval", short_help="Measure a model on your own text: the figures of the demo.")(evaluate)


def evaluate(
    model: options.Model,
    file: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="PDF, HTML, Markdown or text; again for more.", show_default=False),
    ],
    tasks: Annotated[
        str, typer.Option(metavar="NAMES", help="`comparison`, or some of `perplexity,mass,needles,agreement`.")
    ] = "comparison",
    tokens: options.Tokens = None,
    top_k: options.TopK = None,
    local: options.Local = None,
    indexers: options.Indexers = None,
    json: options.Json = None,
    threads: options.Threads = None,
    device: options.Device = None,
    rope_scaling: options.RopeScaling = None,
    cache: options.Cache = None,
    index_dtype: options.IndexDtype = None,
    needle_kinds: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Needles to plant, or `all`: `single`, `multi-key`, `multi-value`, `variable-tracking`; by default "
            "`single`.",
        ),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N", help="Tokens of the texts with needles; by default 2048,4096.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the tasks' figures: .svg, .png or .pdf.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random selection and the needles.")] = 0,
) -> None:
    """Measure a model on a text: dense attention beside DSA beside a sliding window of the same size.

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
    from dsa.eval.plot import draw_tasks
    from dsa.eval.tasks import parse_kinds, parse_lengths, parse_tasks, run_tasks
    from dsa.runs.files import check_writable, write_json
    from dsa.runs.inputs import read_document
    from dsa.runs.plots import check_plot

    names = parse_tasks(tasks)
    for argument, given in (("needle-kinds", needle_kinds), ("lengths", lengths)):
        if given is not None and "needles" not in names:
            raise ValueError(f"{argument}: only needles have them; add the task: --tasks needles")
    kinds = parse_kinds("single" if needle_kinds is None else needle_kinds)
    tokens_of_needles = parse_lengths("2048,4096" if lengths is None else lengths)
    if names == ["comparison"]:
        if len(file) > 1:
            raise ValueError(f"file: the comparison reads one text, got {len(file)}; add --tasks perplexity,mass")
        if plot is not None:
            raise ValueError("plot: the comparison is a table; add --tasks perplexity,mass to draw something")
        compare(model, file[0], tokens, top_k, local, indexers, json, threads, device, rope_scaling, cache, index_dtype)
        return
    if json is not None:
        check_writable(json)
    if plot is not None:
        check_writable(plot, "plot")
        check_plot(plot)
    with notes(), Steps() as reading:
        documents = [read_document(each, progress=reading) for each in file]
    import torch

    from dsa.cli.eval_table import show_tasks
    from dsa.models.extension import scaling_wanted
    from dsa.models.loading import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    with notes(), Steps() as steps:
        scaling = scaling_wanted(rope_scaling, indexers)
        loaded = load_model(model, device=device, status=steps.status, rope_scaling=scaling)
        result = run_tasks(
            loaded,
            documents,
            names,
            tokens=tokens,
            top_k=top_k,
            local=local,
            index_dtype=index_dtype,
            cache=cache,
            indexers=indexers,
            lengths=tokens_of_needles,
            needle_kinds=kinds,
            seed=seed,
            progress=steps,
        )
    if json is not None:
        write_json(json, result)
    if plot is not None:
        draw_tasks(result, plot)
    show_tasks(result, out)
    if json is not None:
        out.print(f"Figures written to {json}", markup=False)
