"""Every field of a JSON value changed, one at a time: absent, of another type, sign, size and depth."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

ABSENT = object()
DEEP = 1000
"""Nested lists of the deepest mutation; `dumps` writes them, since `json` cannot."""

VALUES: tuple[tuple[str, Any], ...] = (
    ("absent", ABSENT),
    ("null", None),
    ("truth", True),
    ("negative", -7),
    ("zero", 0),
    ("huge", 10**9),
    ("enormous", 10**30),
    ("fraction", 0.5),
    ("word", "x"),
    ("list", [1]),
    ("object", {"x": 1}),
    ("deep", "<deep>"),
)


def mutations(value: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """What was done where, and the value with that done: first the whole of it, then every field down to a depth."""
    yield from ((f"whole: {name}", other) for name, other in VALUES if other is not ABSENT)
    for path in _paths(value, depth):
        for name, other in VALUES:
            changed = copy.deepcopy(value)
            place = changed
            for step in path[:-1]:
                place = place[step]
            if other is ABSENT:
                del place[path[-1]]
            else:
                place[path[-1]] = other
            yield f"{'.'.join(map(str, path))}: {name}", changed


def dumps(value: Any) -> str:
    """JSON, with the deepest mutation written out."""
    import json

    return json.dumps(value).replace('"<deep>"', "[" * DEEP + "]" * DEEP)


def _paths(value: Any, depth: int) -> Iterator[tuple[Any, ...]]:
    if not depth:
        return
    steps: Any = value if isinstance(value, dict) else range(min(len(value), 1)) if isinstance(value, list) else ()
    for step in steps:
        yield (step,)
        for rest in _paths(value[step], depth - 1):
            yield (step, *rest)
