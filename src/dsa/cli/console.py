"""What every command shares: where text goes, errors, notes and progress.

Results go to stdout; everything about how it is going goes to stderr.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dsa.runs.progress import Advance


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # rich would end the process with an exit code of failure; `dsa.cli.main` ends it without one.
        raise


out = _Console(highlight=False)
err = _Console(stderr=True, highlight=False)


def print_error(message: str) -> None:
    """Prints what went wrong to stderr."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def note(message: str) -> None:
    """Says what the user should know and need not act on."""
    err.print(f"[yellow]note:[/] {escape(message)}", soft_wrap=True)


class Steps:
    """Bars for the long steps of a command, on stderr; plain lines with their seconds where that is no terminal.

    An instance is a `dsa.runs.progress.Progress`; `status` is a `dsa.models.default_model.Status`.
    """

    def __init__(self) -> None:
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=err,
            # Drawing takes time from what is being measured.
            refresh_per_second=4,
        )
        self._status: Callable[[], None] | None = None

    def __enter__(self) -> Steps:
        if err.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.pause()

    @contextmanager
    def __call__(self, label: str, total: int) -> Iterator[Advance]:
        self._end_status()
        if not err.is_terminal:
            began = time.perf_counter()
            yield lambda parts=1: None
            err.print(f"{label}: {time.perf_counter() - began:.1f} s", markup=False)
            return
        task = self._bars.add_task(escape(label), total=total)
        yield lambda parts=1: self._bars.advance(task, parts)
        self._bars.update(task, total=total, completed=total)

    def pause(self) -> None:
        """Stops drawing; a later step does not draw again."""
        self._end_status()
        if err.is_terminal:
            self._bars.stop()

    def status(self, message: str) -> None:
        """A step whose length is not known; it ends when the next one begins."""
        self._end_status()
        if not err.is_terminal:
            err.print(message, markup=False)
            return
        task = self._bars.add_task(escape(message), total=None)
        self._status = lambda: self._bars.update(task, total=1, completed=1)

    def _end_status(self) -> None:
        if self._status is not None:
            self._status()
            self._status = None


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
def only_from(is_main: bool) -> Iterator[None]:
    """Lets one process of several print while the context is open; an error ends it, and each process prints it."""
    if is_main:
        with notes():
            yield
        return
    before = err.quiet
    err.quiet = True
    try:
        yield
    finally:
        err.quiet = before
