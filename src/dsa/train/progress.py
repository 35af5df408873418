"""How a run says how far it is: to a terminal, to a log that nobody watches, or to a test."""

from __future__ import annotations

import datetime
import math
import time
from dataclasses import dataclass, field
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
        lr: Learning rate in the middle of the step: the indexers' in the warm-up, else the model's.
        kl: Mean loss of the step's updates by layer, in nats; empty in the dense stage.
        seconds: Time spent in steps so far, earlier parts of a resumed run included.
        language: Mean negative log-likelihood of the step's tokens, in nats; not in the warm-up.
        distillation: Mean KL divergence from the dense model's predictions, where it is trained on.
    """

    step: int
    tokens: int
    lr: float
    kl: dict[int, float]
    seconds: float
    language: float | None = None
    distillation: float | None = None

    @property
    def mean_kl(self) -> float | None:
        """Mean over the layers, where any has an indexer that learns."""
        return sum(self.kl.values()) / len(self.kl) if self.kl else None

    def describe(self) -> str:
        """The losses in a few words."""
        losses = [f"loss {self.language:.4f}"] if self.language is not None else []
        return "  ".join([*losses, *([f"KL {self.mean_kl:.4f}"] if self.mean_kl is not None else [])])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        others = {"language": self.language, "distillation": self.distillation, "kl_mean": self.mean_kl}
        by_layer = {str(layer): value for layer, value in self.kl.items()}
        return {
            "step": self.step,
            "tokens": self.tokens,
            "lr": self.lr,
            **{name: value for name, value in others.items() if value is not None},
            **({"kl": by_layer} if by_layer else {}),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class HoldoutRecord:
    """What held-out text shows after some step; a line of `holdout.jsonl`.

    Args:
        step: Steps finished.
        dense: Mean negative log-likelihood with full attention, in nats, over the second halves of the sequences.
        sparse: The same with the selection; `None` for a model without indexers, which has no mass and recall either.
        mass: Share of the dense attention mass that the selection keeps, by layer.
        oracle: The same of the best selection of that size.
        recall: Share of the best selection that the indexer's selection holds, by layer.
        read_all: Whether the budget holds a whole sequence: nothing was selected, so nothing but `dense` was measured.
    """

    step: int
    dense: float
    sparse: float | None = None
    mass: dict[int, float] = field(default_factory=dict)
    oracle: dict[int, float] = field(default_factory=dict)
    recall: dict[int, float] = field(default_factory=dict)
    read_all: bool = False

    @property
    def ratio(self) -> float | None:
        """Perplexity of the sparse over that of the dense pass."""
        return None if self.sparse is None else math.exp(self.sparse - self.dense)

    def describe(self) -> str:
        """One line."""
        if self.sparse is None:
            why = "; nothing was selected, so the indexers were not measured" if self.read_all else ""
            return f"holdout: perplexity {math.exp(self.dense):.3f}{why}"
        mass, oracle, recall = (sum(each.values()) / len(each) for each in (self.mass, self.oracle, self.recall))
        return (
            f"holdout: perplexity {math.exp(self.sparse):.3f}, {self.ratio:.4f} of dense   "
            f"mass {mass:.3f} of {oracle:.3f}   recall {recall:.3f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        if self.sparse is None:
            return {"step": self.step, "dense": self.dense, **({"read_all": True} if self.read_all else {})}
        layers = {"mass": self.mass, "oracle": self.oracle, "recall": self.recall}
        named = {name: {str(layer): value for layer, value in each.items()} for name, each in layers.items()}
        return {"step": self.step, "dense": self.dense, "sparse": self.sparse, "ratio": self.ratio, **named}


class Reporter:
    """Hears how training goes. This one says nothing."""

    def begin(self, done: int, steps: int, layers: list[int]) -> None:
        """Training starts, or goes on, with `done` of `steps` steps finished."""

    def layer(self) -> None:
        """One more layer of the running step is trained."""

    def step(self, record: StepRecord) -> None:
        """A step is finished."""

    def holdout(self, record: HoldoutRecord) -> None:
        """Held-out text was measured."""


class Reporters(Reporter):
    """Several reporters as one.

    Args:
        reporters: All of them are told everything.
    """

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters

    def begin(self, done: int, steps: int, layers: list[int]) -> None:
        for reporter in self.reporters:
            reporter.begin(done, steps, layers)

    def layer(self) -> None:
        for reporter in self.reporters:
            reporter.layer()

    def step(self, record: StepRecord) -> None:
        for reporter in self.reporters:
            reporter.step(record)

    def holdout(self, record: HoldoutRecord) -> None:
        for reporter in self.reporters:
            reporter.holdout(record)


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
            f"step {record.step}/{self.steps}  {record.describe()}  lr {record.lr:.2e}  "
            f"{_speed(self.first, record, now - self.started)}{self._left(record, now)}",
            markup=False,
            soft_wrap=True,
        )

    def holdout(self, record: HoldoutRecord) -> None:
        self.console.print(f"step {record.step}/{self.steps}  {record.describe()}", markup=False, soft_wrap=True)

    def _left(self, record: StepRecord, now: float) -> str:
        assert self.first is not None
        done = record.step - self.first.step
        if not done or record.step == self.steps:
            return ""
        seconds = round((now - self.started) / done * (self.steps - record.step))
        return f"  {datetime.timedelta(seconds=seconds)} left"


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
        self.measured = Text()
        # Drawing takes time from what is being trained.
        self.live = Live(Group(self.bar, self.status, self.measured), console=console, refresh_per_second=4)
        self.steps = 0
        self.units = 1
        self.started = 0.0
        self.first: StepRecord | None = None

    def __enter__(self) -> LiveReporter:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def begin(self, done: int, steps: int, layers: list[int]) -> None:
        self.steps = steps
        self.units = max(1, len(layers))
        self.bar.reset(self.task, total=steps * self.units, completed=done * self.units, steps=f"{done}/{steps} steps")

    def layer(self) -> None:
        self.bar.advance(self.task)

    def step(self, record: StepRecord) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.started = record, now
        self.bar.update(self.task, completed=record.step * self.units, steps=f"{record.step}/{self.steps} steps")
        self.status.plain = (
            f"{self.first.describe()} → {record.describe()}   lr {record.lr:.2e}   "
            f"{_speed(self.first, record, now - self.started)}\n{sparkline(record.kl) if record.kl else ''}"
        )

    def holdout(self, record: HoldoutRecord) -> None:
        self.measured.plain = f"step {record.step}  {record.describe()}"


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
