"""Commands whose options are the fields of dataclasses: an option is written once, in the class that holds it.

In a class of `dsa.cli` the annotation of a field says it all: `Annotated[int, typer.Option(metavar="N", help=...)]`.
A settings class of the library stays free of the command line. Its types, defaults and docstring become the options:
the entry of a field under `Args:` is the help, where other fields are written as flags and strings without quotes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo, ParameterInfo

from dsa.cli.waiting import waiting

METAVARS = {int: "N", float: "X", str: "TEXT"}

Kind = TypeVar("Kind")


class ListCommand(TyperCommand):
    """Lets options whose metavar ends in `...` take several values at once, as a shell's `*.txt` gives them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for parameter in self.params:
            if getattr(parameter, "metavar", None) is not None and str(parameter.metavar).endswith("..."):
                args = spread(parameter.opts[0], args)
        return super().parse_args(ctx, args)


def spread(option: str, args: list[str]) -> list[str]:
    """`--data a b --data c` as `--data a --data b --data c`: what follows up to the next option belongs to it."""
    result: list[str] = []
    inside = False
    for arg in args:
        if arg.startswith("-") and arg != "-":
            inside = arg == option
            if not inside:
                result.append(arg)
        else:
            result.extend((option, arg) if inside else (arg,))
    if args and args[-1] == option:
        result.append(option)
    return result


def add_command(
    app: typer.Typer,
    name: str,
    function: Callable[..., None],
    *,
    short_help: str,
    cls: type[TyperCommand] | None = None,
    settings: Sequence[type] = (),
    omit: Sequence[str] = (),
    panels: Mapping[str, Sequence[str]] | None = None,
    metavars: Mapping[str, str] | None = None,
) -> None:
    """Adds a command to an app. Each field of the dataclasses that `function` takes is one option.

    Args:
        app: The app or group.
        name: What the user types.
        function: Called with the dataclasses, each made from its options; a parameter of another type is an option by
            itself, or the `typer.Context`. Its docstring is the command's help.
        short_help: Shown in the list of commands.
        cls: The command's class.
        settings: More dataclasses whose fields become options. Where several have a field of the same name, the first
            one counts, and those that `function` takes come first. `function` finds the values in `ctx.params` and
            makes what it needs with `build`.
        omit: Names of fields of `settings` that are no options.
        panels: Titles of the help's panels, each with the names of its options in their order. `""` is the panel
            without a title. Options that are not named keep their panel, and come after those that are.
        metavars: Placeholders of values, by name, where the usual one of the type does not say enough.
    """
    command = name
    hints = typing.get_type_hints(function, include_extras=True)
    parameters: dict[str, inspect.Parameter] = {}
    classes: dict[str, type] = {}
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        found = [parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)]
        if dataclasses.is_dataclass(hint):
            classes[parameter.name] = typing.cast(type, hint)
            found = list(parameters_of(classes[parameter.name], metavars or {}))
        for each in found:
            assert each.name not in parameters, f"two options {flag(each.name)} of the command {name}"
            parameters[each.name] = each
    for kind in settings:
        for each in parameters_of(kind, metavars or {}):
            if each.name not in omit:
                parameters.setdefault(each.name, each)
    parameters = arranged(parameters, panels or {})

    @functools.wraps(function)
    def call(**given: Any) -> None:
        arguments: dict[str, Any] = {name: build(kind, given) for name, kind in classes.items()}
        passed = {each: arguments[each] if each in arguments else given[each] for each in hints if each != "return"}
        with waiting.command(f"dsa {command}"):
            function(**passed)

    call.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters.values()}
    app.command(name, cls=cls, short_help=short_help)(call)


def build(kind: type[Kind], given: Mapping[str, Any]) -> Kind:
    """An instance of a dataclass from the values of options; fields that are no options keep their defaults."""
    names = [each.name for each in dataclasses.fields(kind) if each.init]  # type: ignore[arg-type]
    return kind(**{name: given[name] for name in names if name in given})


def parameters_of(kind: type, metavars: Mapping[str, str]) -> Iterator[inspect.Parameter]:
    """The fields of a dataclass as parameters of a typer command."""
    hints = typing.get_type_hints(kind, include_extras=True)
    helps = field_help(kind)
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        is_required = default is dataclasses.MISSING
        hint = hints[field.name]
        if not any(isinstance(each, ParameterInfo) for each in getattr(hint, "__metadata__", ())):
            option = _option(field.name, hint, default, helps.get(field.name, ""), metavars.get(field.name))
            option.show_default = not is_required
            hint = Annotated[hint, option]
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hint,
            default=inspect.Parameter.empty if is_required else default,
        )


def _option(name: str, hint: Any, default: Any, text: str, metavar: str | None) -> OptionInfo:
    """The option of a field that says nothing of the command line: a switch, a choice or a value."""
    plain = next((each for each in typing.get_args(hint) if each is not types.NoneType), hint)
    names = [] if plain is not bool or default is True else [flag(name)]
    usual = METAVARS.get(plain) if plain in METAVARS else None
    made = typer.Option(*names, metavar=metavar or usual, help=text)
    assert isinstance(made, OptionInfo)
    return made


def flag(name: str) -> str:
    """`seq_len` as `--seq-len`."""
    return f"--{name.replace('_', '-')}"


def field_help(kind: type) -> dict[str, str]:
    """What the docstrings of a class and of its bases say about fields, under `Args:`, in the words of a command."""
    names = {each.name for each in dataclasses.fields(kind)}
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", inspect.cleandoc(base.__doc__ or ""), re.MULTILINE)
        for entry in re.split(r"^[ ]{4}(?=\w)", section[1] if section else "", flags=re.MULTILINE)[1:]:
            name, _, text = entry.partition(": ")
            text = re.sub(r"`(\w+)`", lambda word: flag(word[1]) if word[1] in names else word[0], text)
            found[name] = re.sub(r'`"([^`]*)"`', r"`\1`", " ".join(text.split()))
    return found


def arranged(
    parameters: dict[str, inspect.Parameter], panels: Mapping[str, Sequence[str]]
) -> dict[str, inspect.Parameter]:
    """The parameters in the order of the panels, each with its panel."""
    result = {}
    for panel, names in panels.items():
        for name in names:
            kind, *metadata = typing.get_args(parameters[name].annotation)
            # Commands share annotations, so what is changed is a copy.
            [info] = (copy.copy(each) for each in metadata if isinstance(each, ParameterInfo))
            info.rich_help_panel = panel or None
            result[name] = parameters[name].replace(annotation=Annotated[kind, info])
    return result | {name: parameter for name, parameter in parameters.items() if name not in result}
