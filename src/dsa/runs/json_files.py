"""JSON that others wrote: bounded in size and depth, of the types that are expected, refused in one sentence.

A file may be damaged, of another version or hostile. Whoever reads one says with a type what it must look like
(dataclasses, plain types with `Annotated` bounds); what comes back can be used without looking again.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

Value = TypeVar("Value")

MAX_BYTES = 64 << 20
"""A larger file is none that any program here writes or reads: tokenizers of 200,000 words have a third of it."""

Count = Annotated[int, Field(ge=0, lt=1 << 53)]
"""A whole number that is not negative."""

Size = Annotated[int, Field(ge=1, lt=1 << 31)]
"""A whole number of at least one, such as a dimension."""


def read_json(path: Path, expected: type[Value], subject: str, remedy: str) -> Value:
    """The content of a file.

    Args:
        path: The file.
        expected: The type that it must have; see `parse_json`.
        subject: How the sentence begins, with the argument and the file: `"indexers: DIR/indexers.safetensors"`.
        remedy: How it ends: what to do.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is larger than `MAX_BYTES`, not JSON, nested too deeply, or something in it is not what it must
            be; the message names the field, what was expected and what came.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    return parse_json(content, expected, subject, remedy)


def parse_json(content: str | bytes, expected: type[Value], subject: str, remedy: str) -> Value:
    """`read_json` for JSON that lies in memory.

    Args:
        content: The JSON.
        expected: The type that it must have. Numbers, strings and truth values are not converted into each other.
        subject: As in `read_json`.
        remedy: As in `read_json`.

    Raises:
        ValueError: As `read_json`.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"{subject} has more than {MAX_BYTES >> 20} MB of JSON; {remedy}")
    try:
        return cast(Value, _adapter(cast(Hashable, expected)).validate_json(content, strict=True))
    except ValidationError as error:
        raise ValueError(f"{subject} {_in_words(error)}; {remedy}") from error


@cache
def _adapter(expected: Any) -> TypeAdapter[Any]:
    return TypeAdapter(expected)


def _in_words(error: ValidationError) -> str:
    """The first thing that is wrong, as the end of a sentence about the file."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        reason = str(first.get("ctx", {}).get("error", first["msg"]))
        deep = "is nested too deeply" if "recursion" in reason else "is not JSON"
        return f"{deep} ({reason})"
    where = ".".join(str(each) for each in first["loc"])
    name = f"has {where}" if where else "has content"
    if first["type"] == "missing":
        return f"lacks {where}"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"has {where}, a field that is not known here"
    if first["type"] == "value_error":
        return f"does not fit: {first['msg'].removeprefix('Value error, ')}"
    wanted = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{name} = {shown(first['input'])}, expected {wanted[:1].lower()}{wanted[1:]}"


def shown(value: object) -> str:
    """A value as a message shows it, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
