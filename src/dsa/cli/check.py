"""`dsa check`: whether a model's architecture can be attached, tried on a small random model."""

from __future__ import annotations

import typer

from dsa.cli import options
from dsa.cli.commands import add_command
from dsa.cli.console import notes, out, print_json
from dsa.cli.waiting import Steps
from dsa.runs.quiet import quiet_dsa

STYLES = {"holds": "green", "fails": "red", "not the model's": "yellow"}


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(app, "check", check, short_help="Try any model's architecture, on a small random model.")


def check(model: options.Model, json: options.PrintJson = False) -> None:
    """Try whether a model's architecture can be attached: a small random model of its configuration is put to the test.

    MODEL's config.json is read and nothing else; code that comes with a model is never run. The small model has the
    same kinds of layers, few and narrow. Claim by claim it is compared with transformers' own attention. Ends with
    exit code 0 if every claim holds, and 2 with the first that fails.

    [bold]Examples[/]

      dsa check Qwen/Qwen3-0.6B
      dsa check path/to/model
    """
    from dsa.check.checking import check_config
    from dsa.check.claims import CLAIMS
    from dsa.models.loading import read_config

    config = read_config(model)
    # It attaches a dozen times, with random indexers, and says so each time.
    with quiet_dsa(), notes(), Steps() as steps, steps("Checking", len(CLAIMS)) as advance:
        report = check_config(config, lambda: advance(1))
    if json:
        outcomes = [vars(outcome) for outcome in report.outcomes]
        found = {"model": report.model, "row": report.row, "known": report.known, "passed": report.passed}
        print_json({**found, "claims": outcomes, "verdict": report.verdict()})
    else:
        for outcome in report.outcomes:
            style = STYLES[outcome.result]
            out.print(f"{outcome.claim:<28}[{style}]{outcome.result}[/]", end="  " if outcome.note else "\n")
            if outcome.note:
                out.print(outcome.note, markup=False, soft_wrap=True)
        out.print()
        out.print(report.verdict(), markup=False, soft_wrap=True)
    if not report.passed:
        raise typer.Exit(2)
