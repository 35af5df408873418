"""Dense warm-up: the model is frozen and reads with full attention, its indexers learn to predict that attention.

One forward of the frozen model is the expensive part, so every layer's indexer is trained while that forward passes
its layer, several updates each. Nothing needs gradients through the model, and memory holds one layer at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dsa.config import DSAConfig
from dsa.models import config_of, indexers_of
from dsa.models.checkpoint import save_indexers
from dsa.models.context import AttentionCall, DSAContext
from dsa.modules.indexer import Indexer
from dsa.train.chunked import chunked
from dsa.train.data import TokenStream, Window, Windows, seeded
from dsa.train.language import read_window
from dsa.train.layer import LayerTrainer, draw_queries
from dsa.train.loop import (
    NotFiniteError,
    Stage,
    TrainingResult,
    expected_state_bytes,
    narrower_weights_hints,
    shorter_sequence_hint,
)
from dsa.train.options import RunOptions
from dsa.train.progress import StepRecord
from dsa.train.settings import WarmupSettings
from dsa.train.state import RunFolder

LAYERS = "layers."
WHOLE = 16384
"""Sequences up to this length are read as a whole, """
CHUNK = 4096
"""longer ones in chunks of so many tokens."""


def train_indexers(
    model: PreTrainedModel,
    stream: TokenStream,
    out: str | Path,
    settings: WarmupSettings,
    options: RunOptions | None = None,
) -> TrainingResult:
    """Trains the indexers of an attached model, on the model's device.

    The model's own weights are not touched. Its indexers get what was learnt, in their dtype, at every checkpoint.
    A run that was stopped or killed and then resumed has the same losses as one that was not, to the last bit on the
    same machine with the same number of threads and processes.

    Args:
        model: An attached model.
        stream: The training tokens.
        out: Folder of the run: the indexers, the state to resume from, and a log.
        settings: What to do.
        options: How it is run; `None` means the defaults of `RunOptions`.

    Raises:
        ValueError: The model is not attached or has no indexer, a setting or the data does not fit, the state is
            corrupt, or the run to resume is another one; the message names what differs.
        NotFiniteError: A loss or an activation became NaN or infinite; the message names layer and step.
        OSError: `out` is taken, or a file cannot be written; the last checkpoint is intact.
    """
    stage = Warmup(model, stream, settings, RunFolder(out), options or RunOptions())
    was_training = model.training
    model.eval()
    try:
        stage.run()
    finally:
        model.train(was_training)
    return TrainingResult(stage.step, stage.record.kl if stage.record else {}, stage.folder.indexers_file)


class Warmup(Stage):
    """One run: its layers' trainers."""

    name = "warmup"
    config: DSAConfig
    settings: WarmupSettings

    def __init__(
        self,
        model: PreTrainedModel,
        stream: TokenStream,
        settings: WarmupSettings,
        folder: RunFolder,
        options: RunOptions,
    ) -> None:
        indexers = trainable_indexers(model)
        config = config_of(model)
        settings = settings.resolved(config, list(indexers))
        assert settings.queries_per_update is not None
        windows = Windows(
            stream,
            settings.seq_len,
            settings.seed,
            boundaries=settings.boundaries,
            first=max(settings.first_query(config, layer) for layer in indexers),
            at_least=settings.queries_per_update,
        )
        super().__init__(model, config, windows, settings, folder, options)
        self.shard()
        self.trainers = {
            layer: LayerTrainer(layer, indexer, config, settings, self.processes) for layer, indexer in indexers.items()
        }

    def train_step(self, first: int, count: int) -> StepRecord:
        began = time.perf_counter()
        lr = self.settings.lr_at(self.step + 0.5)
        kl = self._read_losses(self._train_on(self.windows(first, count), first))
        tokens = (self.step + 1) * self.sequences * self.settings.seq_len
        return StepRecord(self.step + 1, tokens, lr, kl, self.seconds_since(began))

    @torch.no_grad()
    def _train_on(self, window: Window, number: int) -> dict[int, torch.Tensor]:
        """One forward of the frozen model; what each layer's updates returned."""
        queries: dict[int, torch.Tensor] = {}
        figures: dict[int, torch.Tensor] = {}

        def observe(call: AttentionCall, query_of: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
            first = self.settings.first_query(self.config, call.layer)
            if first not in queries:
                queries[first] = self._draw(window, number, first).to(call.query.device)
            if self.settings.start == "fitted" and self.step == 0:
                self.trainers[call.layer].fit(call, queries[first], query_of)
            figures[call.layer] = self.trainers[call.layer].train(call, queries[first], self.step, query_of)
            self.options.reporter.layer()

        if self.settings.seq_len <= WHOLE:
            self.run_pass(lambda: read_window(self.model, window, DSAContext(mode="dense", observer=observe)))
            return figures
        with chunked(self.model, CHUNK, observe):
            self.run_pass(lambda: read_window(self.model, window, DSAContext(mode="dense")))
        return figures

    def _draw(self, window: Window, number: int, first: int) -> torch.Tensor:
        """Queries `[updates, B, Q]`; those of a sequence depend on its own number only."""
        assert self.settings.queries_per_update is not None
        assert self.settings.updates_per_sequence is not None
        drawn = [
            draw_queries(
                window.eligible(sequence, first),
                self.settings.queries_per_update,
                self.settings.updates_per_sequence,
                seeded(self.settings.seed, number + sequence, first),
            )
            for sequence in range(len(window.ids))
        ]
        return torch.stack(drawn, dim=1)

    def _read_losses(self, figures: dict[int, torch.Tensor]) -> dict[int, float]:
        """The losses by layer: the one place of a step where the host waits for the device."""
        together = torch.stack(list(figures.values()))
        self.processes.mean_([together])
        losses = together.tolist()
        for layer, (loss, activations) in zip(figures, losses):
            if math.isfinite(loss) and math.isfinite(activations):
                continue
            if math.isfinite(activations):
                reason = f"the loss of layer {layer} became {loss}: lower the learning rate ({self.settings.lr})"
            else:
                reason = (
                    f"the model's activations in layer {layer} are not finite (NaN or infinite): check the checkpoint "
                    "and the text, or load the model with dtype=float32"
                )
            raise NotFiniteError(
                f"training stopped in step {self.step + 1}: {reason}. The checkpoint in {self.folder.path} is "
                "from before it"
            )
        return {layer: loss for layer, (loss, _) in zip(figures, losses)}

    def layers(self) -> list[int]:
        return list(self.trainers)

    def identity(self) -> dict[str, Any]:
        return {"settings": self.settings.to_dict()}

    def parts(self) -> set[str]:
        return layer_parts(self.trainers)

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        return layer_states(self.trainers)

    def load_state(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        load_layer_states(self.trainers, tensors)

    def sync_model(self) -> None:
        for trainer in self.trainers.values():
            trainer.write_back()

    def publish(self, finished: bool, weights: dict[str, dict[str, torch.Tensor]]) -> None:
        save_indexers(self.model, self.folder.indexers_file, base_model=self.base_model)

    def memory_hints(self) -> list[str]:
        return [shorter_sequence_hint(self.settings), *narrower_weights_hints(self.model)]

    def expected_bytes(self) -> int:
        return expected_state_bytes({f"{n}": dict(trainer.parameters) for n, trainer in self.trainers.items()})


def trainable_indexers(model: PreTrainedModel) -> dict[int, Indexer]:
    """The indexers of an attached model.

    Raises:
        ValueError: It is not attached, or has none.
    """
    config_of(model)
    indexers = indexers_of(model)
    if not indexers:
        raise ValueError(
            f"{type(model).__name__} has no indexer to train: every layer is dense, shared or sliding; change "
            "DSAConfig.layers"
        )
    return indexers


def layer_parts(trainers: dict[int, LayerTrainer]) -> set[str]:
    """Names of the parts that `layer_states` returns."""
    return {f"{LAYERS}{layer}" for layer in trainers}


def layer_states(trainers: dict[int, LayerTrainer]) -> dict[str, dict[str, torch.Tensor]]:
    """States of the layers' trainers, as a checkpoint has them."""
    return {f"{LAYERS}{layer}": trainer.state() for layer, trainer in trainers.items()}


def load_layer_states(trainers: dict[int, LayerTrainer], tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    """The inverse of `layer_states`."""
    for layer, trainer in trainers.items():
        trainer.load_state(tensors[f"{LAYERS}{layer}"])
