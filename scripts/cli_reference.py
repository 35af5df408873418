#!/usr/bin/env python3
"""Writes docs/reference/cli.md and a page for each command from what `dsa --help` and `dsa COMMAND --help` say.

python scripts/cli_reference.py            # after a change of a command's help or options
python scripts/cli_reference.py --check    # is it current? a test asks the same
"""

from __future__ import annotations

import argparse
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import typer
from rich.text import Text

from dsa.cli.main import app

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"

HEAD = "<!-- Written by scripts/cli_reference.py: change the help in src/dsa/cli, then run it. -->"


def pages() -> dict[Path, str]:
    """Every page by its place: the list of the commands, and one page a command."""
    root = typer.main.get_command(app)
    commands: dict[str, Any] = root.commands  # type: ignore[attr-defined]
    rows = [f"| [dsa {name}](cli/{name}.md) | {next(_prose(command.help))} |" for name, command in commands.items()]
    listed = "\n".join(["| | |", "|---|---|", *rows])
    written = {REFERENCE / "cli.md": [HEAD, "# Commands", *_prose(root.help), listed, _prose_line(root.epilog)]}
    for name, command in commands.items():
        written[REFERENCE / "cli" / f"{name}.md"] = [HEAD, *_command(f"dsa {name}", command, 1)]
    return {place: "\n\n".join(parts) + "\n" for place, parts in written.items()}


def _command(path: str, command: Any, level: int) -> Iterator[str]:
    yield f"{'#' * level} {path}"
    commands = getattr(command, "commands", None)
    arguments = [each for each in command.params if not each.opts[0].startswith("-")]
    usage = " ".join([path, *([] if commands else ["[OPTIONS]"]), *(each.metavar or each.name for each in arguments)])
    yield f"```\n{usage}{' COMMAND' if commands else ''}\n```"
    yield from _prose(command.help)
    for name, inner in (commands or {}).items():
        yield from _command(f"{path} {name}", inner, level + 1)
    if commands:
        return
    hints = typing.get_type_hints(command.callback)
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        panel = parameter.rich_help_panel or ""
        panels.setdefault(panel, []).append(_parameter(parameter, hints.get(parameter.name)))
    for panel, lines in panels.items():
        yield f"**{panel or ('Arguments and options' if arguments else 'Options')}**"
        yield "\n".join(lines)


def _parameter(parameter: Any, hint: Any) -> str:
    """One line of a list: how it is written, what it does, what holds without it."""
    is_option = parameter.opts[0].startswith("-")
    forms = [*parameter.opts, *parameter.secondary_opts] if is_option else []
    choices = next((each for each in (hint, *typing.get_args(hint)) if typing.get_origin(each) is Literal), None)
    value = parameter.metavar or ("|".join(typing.get_args(choices)) if choices else parameter.name.upper())
    written = " / ".join(forms) if getattr(parameter, "is_flag", False) else " ".join([", ".join(forms), value]).strip()
    said = [f"- `{written}`:", _prose_line(parameter.help or "")]
    if parameter.required:
        said.append("*Required.*")
    elif parameter.show_default and parameter.default is not None and parameter.default is not False:
        default = parameter.default
        if default is True:
            default = parameter.opts[0]
        said.append(f"*Default:* `{default}`.")
    return " ".join(said)


def _prose(text: str | None) -> Iterator[str]:
    """Paragraphs; what is indented is shown as it is."""
    code: list[str] = []
    for paragraph in (text or "").strip("\n").split("\n\n"):
        if paragraph.startswith("  "):
            code.append(textwrap.dedent(Text.from_markup(paragraph).plain))
            continue
        if code:
            yield "```\n" + "\n".join(code) + "\n```"
            code = []
        yield _prose_line(paragraph)
    if code:
        yield "```\n" + "\n".join(code) + "\n```"


def _prose_line(text: str) -> str:
    """Rich's markup as Markdown. Options are set as code; characters that Markdown would take for its own are not."""
    plain = Text.from_markup(re.sub(r"\[bold\](.*?)\[/\]", "\x01\\1\x01", text)).plain.strip()
    parts = plain.split("`")
    for number in range(0, len(parts), 2):
        escaped = re.sub(r"([*_<\\])", r"\\\1", parts[number])
        parts[number] = re.sub(r"(?<![\w-])(--[a-z][\w-]*)", r"`\1`", escaped)
    return "`".join(parts).replace("\x01", "**")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are current")
    given = parser.parse_args()
    written = pages()
    places = [REFERENCE / "cli.md", *(REFERENCE / "cli").glob("*.md")]
    on_disk = {file: file.read_text() for file in places if file.exists()}
    if given.check:
        if on_disk != written:
            raise SystemExit(
                "docs/reference/cli is not what the commands' help says: run python scripts/cli_reference.py"
            )
        return
    for file in on_disk.keys() - written.keys():
        file.unlink()
    (REFERENCE / "cli").mkdir(exist_ok=True)
    for file, text in written.items():
        file.write_text(text)


if __name__ == "__main__":
    main()
