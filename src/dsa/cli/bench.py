"""`dsa bench`: how fast the operations and whole models are, compared with what one would use instead."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsa.cli import options
from dsa.cli.commands import add_command
from dsa.cli.console import note, notes, out, print_error
from dsa.cli.waiting import Steps

if TYPE_CHECKING:
    from dsa.bench.settings import Settings
    from dsa.bench.suites import Bench
    from dsa.bench.targets import Target

Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw scaling curves: .png, .svg or .pdf.")]
Targets = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Show what was asked of a figure next to it: `benchmarks/targets.json`."),
]


@dataclass(frozen=True)
class Run:
    """What both suites take."""

    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Run only this row; may be given several times.", show_default=False),
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: whether it runs, not how fast.")] = False
    lengths: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Tokens, in place of each row's own lengths.", show_default=False),
    ] = None
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help=options.MODEL_HELP)] = "default"
    seconds: Annotated[
        float,
        typer.Option(min=0.0, metavar="S", help="Time for the repetitions of one row; what takes longer runs once."),
    ] = 60.0
    threads: options.Threads = None
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the results there, row by row; rows that are there stay."),
    ] = None
    plot: Plot = None
    targets: Targets = None


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
    add_command(group, "ops", ops, short_help="The operations, compared with torch's attention.")
    add_command(group, "e2e", e2e, short_help="A whole model, compared with transformers and llama.cpp.")
    add_command(group, "show", show, short_help="Show and plot results that were written before.")
    for registered in group.registered_commands:
        assert registered.callback is not None
        registered.help = re.sub(r"(?<=\S)\n(?=\S)", " ", inspect.getdoc(registered.callback) or "")
    app.add_typer(group, name="bench", help="Measure speed next to what one would use instead, in the same run.")


def ops(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="`recorded` from the model or `gaussian`; by default both."),
    ] = None,
) -> None:
    """Measure the operations: decode, prefill, memory, index, crossover, loss, quantize.

    Each row first checks its results against the reference. Nothing is printed if they differ. Rows take turns
    with their peers; a ratio is the median over these rounds.

    [bold]Examples[/]

      dsa bench ops --quick
      dsa bench ops --only decode --json results.json
      dsa bench ops --only prefill --lengths 8192,32768 --data gaussian --plot curves.svg
    """
    from dsa.bench.settings import Settings
    from dsa.bench.suites import OPS

    _run(OPS, run, Settings(run.quick, _lengths(run.lengths), run.seconds, _data(data), run.model))


def e2e(
    run: Run,
    llama_python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Python interpreter that has llama-cpp-python; by default this one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure a whole model: short, prompt, decode, llamacpp.

    The peers are the same model with transformers' SDPA attention, and llama.cpp with the default model's own file,
    if llama-cpp-python is installed. Positions beyond the model's own are extrapolated. The peer of a model born with
    DSA is transformers' own path, a mask over dense attention; without --lengths its prompt is as long as memory
    allows.

    [bold]Examples[/]

      dsa bench e2e --only short --json results.json
      dsa bench e2e --only prompt --lengths 8192
      dsa bench e2e --only llamacpp --llama-python llama-venv/bin/python
    """
    from dsa.bench.llamacpp import missing
    from dsa.bench.settings import Settings
    from dsa.bench.suites import E2E

    if llama_python is not None:
        missing(llama_python)
    lengths = _lengths(run.lengths)
    settings = Settings(run.quick, lengths, run.seconds, model=run.model, llama_python=llama_python)
    _run(E2E, run, settings)


def show(
    results: Annotated[Path, typer.Argument(metavar="FILE", help="What `dsa bench --json` wrote.")],
    plot: Plot = None,
    targets: Targets = None,
) -> None:
    """Show results that were written before, and draw them."""
    from dsa.bench.result import read_rows
    from dsa.bench.targets import with_targets
    from dsa.cli.bench_table import show as show_rows
    from dsa.runs.plots import check_plot

    if plot is not None:
        check_plot(plot)
    asked = _targets(targets)
    rows = [with_targets(row, asked) for row in read_rows(results)]
    show_rows(rows, out)
    if plot is not None:
        _draw(rows, plot)


def _run(benches: Mapping[str, Bench], asked: Run, settings: Settings) -> None:
    """Runs, keeps every finished row, and prints all when every check has passed."""
    from dsa.bench.measure import Disagreement
    from dsa.bench.result import merged, read_rows, write_rows
    from dsa.bench.suites import chosen, run
    from dsa.bench.targets import with_targets, without_figure
    from dsa.runs.files import check_writable
    from dsa.runs.plots import check_plot

    selected = chosen(benches, asked.only)
    targets = _targets(asked.targets)
    if asked.plot is not None:
        check_plot(asked.plot)
        check_writable(asked.plot, "plot")
    kept: list[dict[str, Any]] = []
    if asked.json is not None:
        file = check_writable(asked.json)
        kept = read_rows(file) if file.exists() else []
    import torch

    from dsa.cli.bench_table import show as show_rows

    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    made: list[dict[str, Any]] = []
    try:
        with notes(), Steps() as steps:
            for row in run(selected, settings, steps, steps.status):
                made.append(with_targets(row.to_json(), targets))
                kept = merged(kept, made[-1])
                if asked.json is not None:
                    write_rows(asked.json, kept)
    except Disagreement as error:
        print_error(f"{error}; nothing was measured")
        raise typer.Exit(1) from None
    show_rows(made, out)
    for each in made:
        for figure in without_figure(each, targets):
            note(f"targets: the row {each['name']}, {each['case']} has no figure {figure!r}")
    if asked.json is not None:
        out.print(f"Results written to {asked.json}", markup=False)
    if asked.plot is not None:
        _draw(kept, asked.plot)


def _targets(path: Path | None) -> tuple[Target, ...]:
    if path is None:
        return ()
    from dsa.bench.suites import E2E, OPS
    from dsa.bench.targets import read_targets

    return read_targets(path, tuple({**OPS, **E2E}))


def _draw(rows: list[dict[str, Any]], plot: Path) -> None:
    from dsa.bench.plot import draw

    if draw(rows, plot):
        out.print(f"Curves drawn to {plot}", markup=False)
    else:
        out.print("No curves to draw: they need a row at two lengths", markup=False)


def _lengths(given: str | None) -> tuple[int, ...] | None:
    """Raises `ValueError` for anything but positive whole numbers."""
    if given is None:
        return None
    try:
        lengths = tuple(int(part.replace("_", "")) for part in given.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 2:
        raise ValueError(f"lengths: expected numbers of at least 2 tokens, such as 8192,32768, got {given!r}")
    return tuple(sorted(set(lengths)))


def _data(given: str | None) -> tuple[str, ...]:
    from dsa.bench.settings import DATA

    if given is None:
        return DATA
    if given not in DATA:
        raise ValueError(f"data: expected {' or '.join(DATA)}, got {given!r}")
    return (given,)
