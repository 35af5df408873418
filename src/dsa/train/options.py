"""How a run of any stage is run: what does not decide its losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dsa.train.holdout import Holdout
from dsa.train.processes import Processes
from dsa.train.progress import Reporter


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is run.

    Args:
        checkpoint_every: Steps between checkpoints; there is one at the beginning and one at the end too.
        resume: Continue the run in the folder.
        reporter: Is told about the progress.
        should_stop: Called after every step; if it returns true, a checkpoint is written and the run ends.
        processes: Those that share the work (`start_processes`); by default this one does it alone. All of them train
            with equal arguments. Where they shard, the model's weights may lie on the CPU; they go to the device in
            shares, and stay in shares.
        holdout: Text to measure before the first and after the last step.
        holdout_every: Steps between measurements in between; `None` means none.
        recipe: Kept in the folder as `run.yaml`.

    Raises:
        ValueError: A number of steps is below 1.
    """

    checkpoint_every: int = 50
    resume: bool = False
    reporter: Reporter = field(default_factory=Reporter)
    should_stop: Callable[[], bool] = lambda: False
    processes: Processes = field(default_factory=Processes)
    holdout: Holdout | None = None
    holdout_every: int | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "holdout_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
