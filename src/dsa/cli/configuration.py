"""A command's options from a YAML file: the same names as the flags, which win where both are given."""

from __future__ import annotations

import difflib
from enum import Enum
from pathlib import Path
from typing import Any

CONFIG = "config"
UNSAVED = (CONFIG, "resume", "json")


def read_config(path: Path, known: list[str], lists: set[str]) -> dict[str, Any]:
    """The options in a YAML file, by parameter name.

    Args:
        path: The file: one mapping, names as the flags without the leading dashes.
        known: Names of the command's parameters.
        lists: Those of them that take several values.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not YAML, not a mapping, or names what the command does not have.
    """
    import yaml

    from dsa.text import read_text

    try:
        loaded = yaml.safe_load(read_text(path, CONFIG))
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" in line {place.line + 1}" if place is not None else ""
        raise ValueError(f"config: {path} is not YAML{line}: {getattr(error, 'problem', error)}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"config: {path} must hold `name: value` lines, got {type(loaded).__name__}")
    options: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in known or name == CONFIG:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"config: {path} has {key!r}, which the command does not know{hint}")
        if value is None:
            continue
        if name in lists:
            value = [str(each) for each in (value if isinstance(value, list) else [value])]
        elif isinstance(value, list):
            value = ",".join(map(str, value))
        elif isinstance(value, dict):
            raise ValueError(f"config: {key} in {path} must be a single value, got a mapping")
        options[name] = value
    return options


def write_config(options: dict[str, Any]) -> str:
    """The options of a run as YAML that `read_config` reads; what has no value is left out."""
    import yaml

    plain = {
        name: _plain(value)
        for name, value in options.items()
        if name not in UNSAVED and value is not None and value != []
    }
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
