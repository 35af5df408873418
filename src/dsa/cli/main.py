"""The `dsa` command. Nothing heavy is imported until a command runs, so that help answers at once."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dsa.cli import ends
from dsa.cli.console import print_error

COMMANDS = (
    *("demo", "info", "models", "train", "calibrate", "read", "generate", "chat", "serve", "eval", "explain"),
    *("export", "cost", "check", "store", "bench"),
)

HELP = """DeepSeek Sparse Attention for pretrained language models.

[bold]dsa demo[/] reads a real document with dense attention, with DSA and with a sliding window, and compares them.

[bold]MODEL[/] is a Hugging Face id, a directory that `save_pretrained` wrote, or `default`: SmolLM2-135M with the
indexers that come with this package. It is a model of 135M parameters that shows the mechanism; over more than a page
it does not answer. Larger ones take indexers: `dsa models` lists what is here.
"""

EPILOG = "A user's mistake ends with one message and exit code 2; DSA_DEBUG=1 shows where it was noticed."


class Commands(TyperGroup):
    """Turns what a user got wrong into one message and exit code 2, and a stop into one word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, args)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except KeyboardInterrupt:
            # typer would end with the same code and say nothing.
            raise SystemExit(ends.stopped()) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            raise typer.Exit(ends.stopped()) from None
        except BrokenPipeError:
            ends.flush_or_drop()
            raise typer.Exit from None
        except Exception as error:
            code = ends.exit_code(error)
            if code is None or os.environ.get("DSA_DEBUG"):
                raise
            arguments = ctx.meta["arguments"]
            print_error(ends.message(error, arguments, self._options(ctx, arguments)))
            ends.flush_or_drop()
            raise typer.Exit(code) from None

    def _options(self, ctx: Any, arguments: Sequence[str]) -> list[str]:
        """What the options of the command on the line are called."""
        command: Any = self
        for word in arguments:
            command = getattr(command, "commands", {}).get(word, command)
        return [name for parameter in command.params for name in parameter.opts if name.startswith("--")]


def version(asked: bool) -> None:
    """Prints the version and ends."""
    if asked:
        from dsa import __version__

        typer.echo(f"dsa {__version__}")
        raise typer.Exit


def unwrapped(text: str) -> str:
    """A docstring with every paragraph on one line, to be wrapped anew; indented lines stay as they are."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)


app = typer.Typer(
    name="dsa",
    cls=Commands,
    help=unwrapped(HELP),
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", "-V", callback=version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for command in COMMANDS:
    importlib.import_module(f"dsa.cli.{command}").register(app)
for registered in app.registered_commands:
    assert registered.callback is not None
    registered.help = unwrapped(inspect.getdoc(registered.callback) or "")


def run() -> None:
    """Entry point of the `dsa` script."""
    ends.open_streams()
    ends.catch_signals()
    app()
