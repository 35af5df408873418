"""`dsa bench`: how fast the operations and whole models are, beside what one would use instead."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsa.cli import options
from dsa.cli.console import Steps, notes, out, print_error

if TYPE_CHECKING:
    from dsa.bench.settings import Settings
    from dsa.bench.suites import Bench

Only = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Run only this row; may be given several times.", show_default=False),
]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes: whether it runs, not how fast.")]
Lengths = Annotated[
    str | None, typer.Option(metavar="N,N,...", help="Tokens, in place of each row's own lengths.", show_default=False)
]
Seconds = Annotated[
    float, typer.Option(min=0.0, metavar="S", help="Time for the repetitions of one row; what takes longer runs once.")
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the results there, row by row; rows that are there stay."),
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw scaling curves: .png, .svg or .pdf.")]
Model = Annotated[str, typer.Option("--model", metavar="MODEL", help=options.MODEL_HELP)]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
    group.command("ops", short_help="The operations, beside torch's attention.")(ops)
    group.command("e2e", short_help="A whole model, beside transformers and llama.cpp.")(e2e)
    group.command("show", short_help="Show and plot results that were written before.")(show)
    for registered in group.registered_commands:
        assert registered.callback is not None
        registered.help = re.sub(r"(?<=\S)\n(?=\S)", " ", inspect.getdoc(registered.callback) or "")
    app.add_typer(group, name="bench", help="Measure speed beside what one would use instead, in the same run.")


def ops(
    only: Only = None,
    quick: Quick = False,
    lengths: Lengths = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="`recorded` from the model or `gaussian`; by default both."),
    ] = None,
    model: Model = "default",
    seconds: Seconds = 60.0,
    threads: options.Threads = None,
    json: Json = None,
    plot: Plot = None,
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

    settings = Settings(quick=quick, lengths=_lengths(lengths), seconds=seconds, data=_data(data), model=model)
    _run(OPS, only, settings, threads, json, plot)


def e2e(
    only: Only = None,
    quick: Quick = False,
    lengths: Lengths = None,
    model: Model = "default",
    llama_python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Python interpreter that has llama-cpp-python; by default this one.",
            show_default=False,
        ),
    ] = None,
    seconds: Seconds = 60.0,
    threads: options.Threads = None,
    json: Json = None,
    plot: Plot = None,
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
    settings = Settings(quick=quick, lengths=_lengths(lengths), seconds=seconds, model=model, llama_python=llama_python)
    _run(E2E, only, settings, threads, json, plot)


def show(
    results: Annotated[Path, typer.Argument(metavar="FILE", help="What `dsa bench --json` wrote.")],
    plot: Plot = None,
) -> None:
    """Show results that were written before, and draw them."""
    from dsa.bench.result import read_rows
    from dsa.cli.bench_table import show as show_rows
    from dsa.runs.plots import check_plot

    if plot is not None:
        check_plot(plot)
    rows = read_rows(results)
    show_rows(rows, out)
    if plot is not None:
        _draw(rows, plot)


def _run(
    benches: Mapping[str, Bench],
    only: list[str] | None,
    settings: Settings,
    threads: int | None,
    json: Path | None,
    plot: Path | None,
) -> None:
    """Runs, keeps every finished row, and prints all when every check has passed."""
    from dsa.bench.measure import Disagreement
    from dsa.bench.result import merged, read_rows, write_rows
    from dsa.bench.suites import chosen, run
    from dsa.runs.files import check_writable
    from dsa.runs.plots import check_plot

    selected = chosen(benches, only)
    if plot is not None:
        check_plot(plot)
        check_writable(plot, "plot")
    kept: list[dict[str, Any]] = []
    if json is not None:
        file = check_writable(json)
        kept = read_rows(file) if file.exists() else []
    import torch

    from dsa.cli.bench_table import show as show_rows

    if threads is not None:
        torch.set_num_threads(threads)
    made: list[dict[str, Any]] = []
    try:
        with notes(), Steps() as steps:
            for row in run(selected, settings, steps, steps.status):
                made.append(row.to_json())
                kept = merged(kept, made[-1])
                if json is not None:
                    write_rows(json, kept)
    except Disagreement as error:
        print_error(f"{error}; nothing was measured")
        raise typer.Exit(1) from None
    show_rows(made, out)
    if json is not None:
        out.print(f"Results written to {json}", markup=False)
    if plot is not None:
        _draw(kept, plot)


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
