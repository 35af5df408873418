"""What a user sees while a command works: a word within a second, then at least every five.

On an animated terminal the running steps are drawn under what was printed, and taken away when they end. Everywhere
else (`TERM=dumb`, a pipe, a file) there is a line of text about every four seconds, and none while others speak.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dsa.cli.console import before_printing, err
from dsa.runs.progress import Advance, Progress

FIRST_S = 0.4
"""Silence before the first word of a command."""
SILENCE_S = 4.0
"""Silence before a line: with what a busy machine adds it stays below five seconds."""
TICK_S = 0.2
FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
ESTIMATED_AFTER_S = 1.0
"""Seconds of a step before its time left is said."""

Work = Callable[[float], float]
"""How much work the first so many parts of a step are, in any unit: later tokens take longer than early ones."""


class Step:
    """One step that is under way; `total` is `None` where its length is not known."""

    def __init__(self, label: str, total: int | None, work: Work | None = None) -> None:
        self.label, self.total, self.done = label, total, 0
        self.began = time.perf_counter()
        self._work = work or (lambda parts: parts)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def left_s(self) -> float | None:
        """Seconds that it will still take; `None` where nothing can be said yet."""
        if not self.total or not self.done or self.seconds < ESTIMATED_AFTER_S:
            return None
        done = self._work(self.done)
        return self.seconds * (self._work(self.total) - done) / done if done > 0 else None

    def figures(self) -> str:
        """How far it is: per cent, seconds passed and left."""
        said = [f"{100 * self.done // self.total} %"] if self.total else []
        said.append(duration(self.seconds))
        left = self.left_s()
        if left is not None and self.done < (self.total or 0):
            said.append(f"about {duration(left)} left")
        return ", ".join(said)

    def line(self, width: int | None = None) -> str:
        """Label and figures; of a line that is too long the label is cut, never the figures."""
        figures = self.figures()
        room = None if width is None else max(8, width - len(figures) - 2)
        label = self.label if room is None or len(self.label) <= room else f"{self.label[: room - 1]}…"
        return f"{label}: {figures}"


class Waiting:
    """What is being waited for in this process, and who says so: one thread that speaks where nobody else does."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._heard = time.perf_counter()
        self._said = False
        self._paused = 0
        self._name = ""
        self._ended = threading.Event()
        self._ended.set()

    @contextmanager
    def command(self, name: str) -> Iterator[None]:
        """Speaks while a command runs; a command within a command changes nothing."""
        if not self._ended.is_set():
            yield
            return
        self._said, self._paused, self._heard = False, 0, time.perf_counter()
        self.steps = [Step(f"{name}: loading libraries", None)]
        self._name = name
        self._ended.clear()
        thread = threading.Thread(target=self._speak, name="dsa-waiting", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self.clear()
            self.steps = []

    def begin(self, step: Step) -> None:
        """A step has begun; whatever comes between it and the next one is no loading of libraries."""
        if self.steps:
            self.steps[0].label = f"{self._name}: working"
        self.steps.append(step)

    def pause(self) -> None:
        """Says nothing any more, until `resume`: somebody else draws or writes."""
        with self._lock:
            self._paused += 1
            self.clear()

    def resume(self) -> None:
        """The opposite of `pause`."""
        with self._lock:
            self._paused = max(0, self._paused - 1)
            self._heard = time.perf_counter()

    def clear(self) -> None:
        """Takes away what is drawn, before somebody prints; it comes back after a while."""
        with self._lock:
            self._heard, self._said = time.perf_counter(), True
            live, self._live = self._live, None
            if live is not None:
                live.stop()

    def _speak(self) -> None:
        while not self._ended.wait(TICK_S):
            try:
                self._tick()
            except (OSError, ValueError):
                # Nobody reads stderr any more.
                return

    def _tick(self) -> None:
        """Says something where nobody has for a while."""
        with self._lock:
            silence = time.perf_counter() - self._heard
            if self._paused or self._live is not None or err.quiet or self._ended.is_set():
                return
            if animated():
                if silence >= FIRST_S:
                    self._live = Live(
                        get_renderable=self._draw,
                        console=_drawn_on,
                        transient=True,
                        # Drawing takes time from what is being measured.
                        refresh_per_second=4,
                        redirect_stdout=False,
                        redirect_stderr=False,
                    )
                    self._live.start(refresh=True)
            elif silence >= (SILENCE_S if self._said else FIRST_S) and self.steps:
                err.print(self.steps[-1].line(), markup=False, soft_wrap=True)

    def _draw(self) -> Group:
        frame = FRAMES[int(4 * time.perf_counter()) % len(FRAMES)]
        shown = self.steps[1:] or self.steps
        return Group(*(Text(f"{frame} {step.line(err.width - 2)}", no_wrap=True) for step in shown))


# Not `err`: what is printed there takes away what is drawn.
_drawn_on = Console(stderr=True, highlight=False, emoji=False)
waiting = Waiting()
before_printing.append(waiting.clear)


class Steps:
    """The long steps of a command. An instance is a `dsa.runs.progress.Progress`; `status` a step of unknown length.

    Args:
        keep: Leave a line with its seconds where a step has ended.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._status: Step | None = None
        self._paused = False

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *error: object) -> None:
        self._end_status(failed=error[0] is not None)
        if self._paused:
            self._paused = False
            waiting.resume()

    @contextmanager
    def __call__(self, label: str, total: int, *, work: Work | None = None) -> Iterator[Advance]:
        """Begins a step of `total` parts; `work` says how they grow, where they do."""
        self._end_status()
        step = self._begin(Step(label, total, work))

        def advance(parts: int = 1) -> None:
            step.done += parts

        try:
            yield advance
        except BaseException:
            self._end(step, failed=True)
            raise
        self._end(step)

    def growing(self, work: Callable[[float], float], end: int) -> Progress:
        """The same for a step that ends at position `end` and whose parts grow as `work`, of a position, does."""

        def progress(label: str, total: int) -> object:
            start = end - total
            return self(label, total, work=lambda parts: work(start + parts) - work(start))

        return progress  # type: ignore[return-value]

    def pause(self) -> None:
        """Nothing is shown any more: what follows is written."""
        self._end_status()
        if not self._paused:
            self._paused = True
            waiting.pause()

    def status(self, message: str) -> None:
        """A step whose length is not known; it ends when the next one begins."""
        self._end_status()
        self._status = self._begin(Step(message, None))

    def _begin(self, step: Step) -> Step:
        waiting.begin(step)
        return step

    def _end(self, step: Step, *, failed: bool = False) -> None:
        if step in waiting.steps:
            waiting.steps.remove(step)
        if self._keep and not failed:
            err.print(f"{step.label}: {step.seconds:.1f} s", markup=False, soft_wrap=True)

    def _end_status(self, *, failed: bool = False) -> None:
        step, self._status = self._status, None
        if step is not None:
            self._end(step, failed=failed)


@contextmanager
def drawn_elsewhere() -> Iterator[None]:
    """Says nothing while the context is open, because somebody else does."""
    waiting.pause()
    try:
        yield
    finally:
        waiting.resume()


def animated() -> bool:
    """Whether stderr is a terminal that lines can be taken away from again."""
    return err.is_terminal and not err.is_dumb_terminal


def duration(seconds: float) -> str:
    """A time as one says it: `8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{round(whole / 60)} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def roughly(seconds: float) -> str:
    """A time that is a guess: `40 s`, `3 min`, `1 h 20 min`."""
    if seconds < 55:
        return f"{max(10, round(seconds, -1)):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    tens = round(minutes, -1)
    return f"{tens // 60} h" + (f" {tens % 60} min" if tens % 60 else "")
