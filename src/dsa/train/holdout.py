"""Held-out text, measured now and then: what the selection costs, and what it finds, by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dsa.config import DSAConfig
from dsa.eval.mass import MassObserver
from dsa.models.attached import indexers_of
from dsa.models.context import DSAContext
from dsa.train.data import TokenStream, Window, Windows
from dsa.train.language import language_losses, predicted, read_window
from dsa.train.progress import HoldoutRecord


@dataclass(frozen=True)
class Holdout:
    """Sequences that are not trained on.

    Args:
        windows: Where they come from.
        sequences: How many are measured, the same ones every time.
    """

    windows: Windows
    sequences: int

    @classmethod
    def of(cls, stream: TokenStream, seq_len: int, sequences: int, *, boundaries: bool = True) -> Holdout:
        """The first sequences of a stream in a fixed random order.

        Raises:
            ValueError: The stream is shorter than a sequence.
        """
        try:
            windows = Windows(stream, seq_len, 0, boundaries=boundaries, first=seq_len // 2)
        except ValueError as error:
            raise ValueError(f"holdout: {error}") from error
        return cls(windows, min(sequences, len(stream) // seq_len))

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, config: DSAConfig | None, step: int) -> HoldoutRecord:
        """Reads every sequence twice, dense and sparse; figures are over positions from the middle on.

        Without a configuration the model is not attached, and reads once; so it does where nothing is selected.
        """
        was_training = model.training
        model.eval()
        try:
            return self._measure(model, config, step)
        finally:
            model.train(was_training)

    def _measure(self, model: PreTrainedModel, config: DSAConfig | None, step: int) -> HoldoutRecord:
        start = self.windows.seq_len // 2
        read_all = config is not None and selects_nothing(model, config, self.windows.seq_len)
        observer = None if config is None or read_all else MassObserver(config, start)
        sums = {"dense": 0.0, "sparse": 0.0}
        count = 0
        for number in range(self.sequences):
            window = self.windows(number)
            count += int(predicted(window, start).sum())
            if observer is None:
                sums["dense"] += self._loss(model, window, DSAContext(mode="dense") if read_all else None, start)
                continue
            sums["dense"] += self._loss(model, window, DSAContext(mode="dense", observer=observer), start)
            sums["sparse"] += self._loss(model, window, DSAContext(), start)
        if observer is None:
            return HoldoutRecord(step, sums["dense"] / count, read_all=read_all)
        layers = sorted({row.layer for row in observer.layers})

        def mean(name: str) -> dict[int, float]:
            rows = {layer: [getattr(row, name) for row in observer.layers if row.layer == layer] for layer in layers}
            return {layer: sum(values) / len(values) for layer, values in rows.items()}

        return HoldoutRecord(
            step, sums["dense"] / count, sums["sparse"] / count, mean("dsa"), mean("oracle"), mean("recall")
        )

    def _loss(self, model: PreTrainedModel, window: Window, context: DSAContext | None, start: int) -> float:
        output = read_window(model, window, context)
        return float(language_losses(model, output, window, start=start)[0])


def selects_nothing(model: PreTrainedModel, config: DSAConfig, seq_len: int) -> bool:
    """Whether every layer's budget holds all tokens of a sequence."""
    return seq_len <= min((config.layer_top_k(layer) for layer in indexers_of(model)), default=0)
