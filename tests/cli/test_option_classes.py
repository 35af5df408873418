"""Commands whose options are the fields of dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import typer
from typer.testing import CliRunner, Result

from dsa.cli import options
from dsa.cli.commands import ListCommand, add_command, build, field_help


@dataclass(frozen=True, kw_only=True)
class Inputs:
    model: options.Model
    files: Annotated[list[Path], typer.Option(metavar="FILES...", help="What is read.", show_default=False)]
    threads: options.Threads = None


@dataclass(frozen=True)
class Settings:
    """How it is done.

    Args:
        steps: How often.
        rate: How fast, by default as
            `steps` says.
        schedule: `"even"`, or anything else but `"steps"`.
        again: Do it again.
        boundaries: Stop at the boundaries.
        names: No option changes them.
    """

    steps: int
    rate: float | None = None
    schedule: Literal["even", "odd"] = "even"
    again: bool = False
    boundaries: bool = True
    names: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class MoreSettings(Settings):
    """More of it.

    Args:
        rate: Not what the command says.
        width: How wide.
    """

    width: int = 8


PANELS = {"": ("threads", "model"), "How": ("rate", "steps", "width")}


def run(*args: str) -> tuple[Result, list[Any]]:
    seen: list[Any] = []

    def command(ctx: typer.Context, inputs: Inputs, settings: Settings) -> None:
        """Do something."""
        seen.extend((inputs, settings, build(MoreSettings, ctx.params)))

    app = typer.Typer(add_completion=False)
    app.callback()(lambda: None)
    add_command(
        app,
        "do",
        command,
        short_help="Do.",
        cls=ListCommand,
        settings=[MoreSettings],
        panels=PANELS,
        metavars={"width": "COLUMNS"},
    )
    return CliRunner().invoke(app, ["do", *args], env={"COLUMNS": "100", "TERM": "dumb"}), seen


def test_fields_become_options_and_options_objects() -> None:
    result, seen = run("m", "--files", "a", "b", "--steps", "3", "--schedule", "odd", "--again", "--width", "4")
    assert result.exit_code == 0, result.output
    inputs, settings, more = seen
    assert inputs == Inputs(model="m", files=[Path("a"), Path("b")])
    assert settings == Settings(3, schedule="odd", again=True)
    assert more == MoreSettings(3, schedule="odd", again=True, width=4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["m", "--files", "a"], "Missing option '--steps'"),
        (["--files", "a", "--steps", "3"], "Missing argument 'MODEL'"),
        (["m", "--files", "a", "--steps", "3", "--schedule", "x"], "'x' is not one of 'even', 'odd'"),
        (["m", "--files", "a", "--steps", "3", "--no-again"], "No such option: --no-again"),
        (["m", "--files", "a", "--steps", "3", "--threads", "0"], "should be greater than or equal to 1"),
        (["m", "--files", "a", "--steps", "3", "--names", "x"], "No such option: --names"),
    ],
)
def test_wrong_values(args: list[str], message: str) -> None:
    result, seen = run(*args)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not seen


def test_the_class_validates() -> None:
    result, seen = run("m", "--files", "a", "--steps", "0")
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == "steps must be at least 1, got 0"
    assert not seen


def test_help() -> None:
    result, _ = run("--help")
    shown = [" ".join(line.strip("│ ").split()) for line in result.stdout.splitlines()]
    order = ["--threads N", "--files", "--schedule", "--again", "--boundaries", "How", "--rate X", "--steps", "--width"]
    places = [next(at for at, line in enumerate(shown) if expected in line.replace("* ", "")) for expected in order]
    assert places == sorted(places)
    text = " ".join(shown)
    assert "How fast, by default as --steps says." in text
    assert "--width COLUMNS How wide. [default: 8]" in text
    assert "even|odd" in text
    assert "`even`, or anything else but `steps`. [default: even]" in text
    assert "no-again" not in text
    assert "--no-boundaries" in text
    assert "Not what the command says" not in text


def test_a_shared_annotation_stays_as_it_is() -> None:
    run("--help")
    assert get_args(options.Threads)[1].rich_help_panel is None


def test_help_of_inherited_fields() -> None:
    assert field_help(MoreSettings) == {
        **field_help(Settings),
        "rate": "Not what the command says.",
        "width": "How wide.",
    }


def test_two_options_of_one_name() -> None:
    def command(inputs: Inputs, threads: options.Threads = None) -> None:
        pass

    with pytest.raises(AssertionError, match="two options --threads"):
        add_command(typer.Typer(), "do", command, short_help="Do.")
