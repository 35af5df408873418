"""What every command shares: where text goes, errors and notes.

Results go to stdout; everything about how it is going goes to stderr.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

before_printing: list[Callable[[], None]] = []
"""Called before anything is printed: what is drawn under it has to go."""


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        for each in before_printing:
            each()
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        # rich would end the process with an exit code of failure; `dsa.cli.main` ends it without one.
        raise


# Names of users are text: `:smile:` stays as it is.
out = _Console(highlight=False, emoji=False)
err = _Console(stderr=True, highlight=False, emoji=False)


def print_error(message: str) -> None:
    """Prints what went wrong to stderr."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def print_json(plain: object) -> None:
    """Prints plain JSON types to stdout."""
    out.print(json.dumps(plain, indent=1, ensure_ascii=False), markup=False, soft_wrap=True)


def note(message: str) -> None:
    """Says what the user should know and need not act on."""
    err.print(f"[yellow]note:[/] {escape(message)}", soft_wrap=True)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage().removeprefix("dsa: "))


@contextmanager
def notes() -> Iterator[None]:
    """Shows what the library warns of as notes, each once."""
    logger, handler = logging.getLogger("dsa"), _Notes()
    said: set[str] = set()

    def show(message: Warning | str, *details: object, **more: object) -> None:
        if str(message) not in said:
            said.add(str(message))
            note(str(message))

    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def without_messages(words: str | None) -> Iterator[None]:
    """Leaves out what the library says with these words, because it has been said in others."""
    logger = logging.getLogger("dsa")

    def others(record: logging.LogRecord) -> bool:
        return words is None or words not in record.getMessage()

    handlers = list(logger.handlers)
    for each in handlers:
        each.addFilter(others)
    try:
        yield
    finally:
        for each in handlers:
            each.removeFilter(others)


@contextmanager
def quietly(is_quiet: bool = True) -> Iterator[None]:
    """Prints nothing to stderr while the context is open; what then goes wrong is printed."""
    before = err.quiet
    err.quiet = before or is_quiet
    try:
        yield
    finally:
        err.quiet = before


@contextmanager
def only_from(is_main: bool) -> Iterator[None]:
    """Lets one process of several print while the context is open; an error ends it, and each process prints it."""
    if is_main:
        with notes():
            yield
        return
    with quietly():
        yield
