"""How a run says how far it is: to a terminal, to a log that nobody watches, or to a test."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
SPARKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class StepRecord:
    """One finished step; a line of `log.jsonl`.

    Args:
        step: Steps finished.
        tokens: Tokens read so far.
        lr: Learning rate in the middle of the step.
        kl: Mean loss of the step's updates by layer, in nats.
        seconds: Time spent in steps so far, earlier parts of a resumed run included.
    """

    step: int
    tokens: int
    lr: float
    kl: dict[int, float]
    seconds: float

    @property
    def mean_kl(self) -> float:
        """Mean over the layers."""
        return sum(self.kl.values()) / len(self.kl)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        kl = {str(layer): value for layer, value in self.kl.items()}
        return {
            "step": self.step,
            "tokens": self.tokens,
            "lr": self.lr,
            "kl_mean": self.mean_kl,
            "kl": kl,
            "seconds": round(self.seconds, 3),
        }


class Reporter:
    """Hears how training goes. This one says nothing."""

    def begin(self, done: int, steps: int, layers: list[int]) -> None:
        """Training starts, or goes on, with `done` of `steps` steps finished."""

    def layer(self) -> None:
        """One more layer of the running step is trained."""

    def step(self, record: StepRecord) -> None:
        """A step is finished."""


class LineReporter(Reporter):
    """A line about every ten seconds, and one at the end: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.steps = 0
        self.started = self.last = 0.0
        self.first: StepRecord | None = None

    def begin(self, done: int, steps: int, layers: list[int]) -> None:
        self.steps = steps
        self.started = self.last = time.monotonic()

    def step(self, record: StepRecord) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.started = record, now
        elif now - self.last < SECONDS_BETWEEN_LINES and record.step < self.steps:
            return
        self.last = now
        self.console.print(
            f"step {record.step}/{self.steps}  KL {record.mean_kl:.4f}  lr {record.lr:.2e}  "
            f"{_speed(self.first, record, now - self.started)}",
            markup=False,
            soft_wrap=True,
        )


class LiveReporter(Reporter):
    """A bar with the time left, and under it the loss of every layer as a row of blocks."""

    def __init__(self, console: Console) -> None:
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.fields[steps]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("training", steps="")
        self.status = Text()
        # Drawing takes time from what is being trained.
        self.live = Live(Group(self.bar, self.status), console=console, refresh_per_second=4)
        self.steps = 0
        self.started = 0.0
        self.first: StepRecord | None = None

    def __enter__(self) -> LiveReporter:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def begin(self, done: int, steps: int, layers: list[int]) -> None:
        self.steps = steps
        self.bar.reset(
            self.task, total=steps * len(layers), completed=done * len(layers), steps=f"{done}/{steps} steps"
        )

    def layer(self) -> None:
        self.bar.advance(self.task)

    def step(self, record: StepRecord) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.started = record, now
        self.bar.update(self.task, steps=f"{record.step}/{self.steps} steps")
        self.status.plain = (
            f"KL {self.first.mean_kl:.4f} → {record.mean_kl:.4f}   lr {record.lr:.2e}   "
            f"{_speed(self.first, record, now - self.started)}\n{sparkline(record.kl)}"
        )


def sparkline(kl: dict[int, float]) -> str:
    """One block per layer, as high as its loss; names the layer with the highest."""
    top = max(kl.values())
    blocks = "".join(SPARKS[min(len(SPARKS) - 1, int(value / top * len(SPARKS)))] for value in kl.values())
    worst = max(kl, key=lambda layer: kl[layer])
    return f"KL by layer {min(kl)}-{max(kl)}: {blocks}  highest: layer {worst}, {top:.4f}"


def _speed(first: StepRecord, record: StepRecord, seconds: float) -> str:
    if record.step == first.step or seconds <= 0:
        return ""
    return f"{(record.tokens - first.tokens) / seconds:,.0f} tokens/s"
