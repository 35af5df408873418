"""Scalars of a run for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsa.runs.machine import peak_rss_mb
from dsa.train.extras import needed
from dsa.train.progress import HoldoutRecord, Reporter, StepRecord


class TensorBoardReporter(Reporter):
    """Writes losses, learning rate, speed and memory per step, and what held-out text shows.

    Args:
        folder: Gets the event files; `tensorboard --logdir FOLDER` shows them.
        device: Of the model: the memory shown is that of its GPU, or the process's resident peak.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        needed("tensorboard", "writing scalars for TensorBoard")
        self.folder = folder
        self.device = device
        self.writer: Any = None
        self.last: StepRecord | None = None

    def begin(self, done: int, steps: int, layers: list[int]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote after its last checkpoint comes again.
        self.writer = SummaryWriter(str(self.folder), purge_step=done + 1 if done else None)

    def step(self, record: StepRecord) -> None:
        scalars = {"train/lr": record.lr, "train/memory_mb": self._memory_mb()}
        optional = {
            "train/kl_mean": record.mean_kl,
            "train/language_loss": record.language,
            "train/distillation": record.distillation,
        }
        scalars |= {name: value for name, value in optional.items() if value is not None}
        if self.last is not None and record.seconds > self.last.seconds:
            scalars["train/tokens_per_s"] = (record.tokens - self.last.tokens) / (record.seconds - self.last.seconds)
        scalars |= {f"kl/layer_{layer:03d}": value for layer, value in record.kl.items()}
        self._write(scalars, record.step)
        self.last = record

    def holdout(self, record: HoldoutRecord) -> None:
        scalars = {"holdout/language_loss_dense": record.dense}
        optional = {"holdout/language_loss_sparse": record.sparse, "holdout/perplexity_ratio": record.ratio}
        scalars |= {name: value for name, value in optional.items() if value is not None}
        for name, layers in (("mass", record.mass), ("oracle", record.oracle), ("recall", record.recall)):
            if layers:
                scalars[f"holdout/{name}_mean"] = sum(layers.values()) / len(layers)
            scalars |= {f"holdout_{name}/layer_{layer:03d}": value for layer, value in layers.items()}
        self._write(scalars, record.step)

    def _write(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def _memory_mb(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        return peak_rss_mb()
