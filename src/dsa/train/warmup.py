"""Dense warm-up: the model is frozen and reads with full attention, its indexers learn to predict that attention.

One forward of the frozen model is the expensive part, so every layer's indexer is trained while that forward passes
its layer, several updates each. Nothing needs gradients through the model, and memory holds one layer at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dsa.models import config_of, indexers_of
from dsa.models.checkpoint import describe_base_model, save_indexers
from dsa.models.context import AttentionCall, DSAContext
from dsa.train.data import TokenStream, Windows, seeded
from dsa.train.layer import LayerTrainer, draw_queries
from dsa.train.progress import Reporter, StepRecord
from dsa.train.settings import WarmupSettings
from dsa.train.state import RunFolder, TrainingState, differences, state_bytes


class NotFiniteError(ValueError):
    """A loss or an activation became NaN or infinite. The last checkpoint is intact."""


@dataclass(frozen=True)
class WarmupResult:
    """What a run came to.

    Args:
        step: Steps finished; fewer than asked for where the run was stopped.
        kl: Loss of the last step by layer, in nats; empty if no step ran.
        indexers: The file for `dsa.attach(model, indexers=...)`.
    """

    step: int
    kl: dict[int, float]
    indexers: Path


def train_indexers(
    model: PreTrainedModel,
    stream: TokenStream,
    out: str | Path,
    settings: WarmupSettings,
    *,
    checkpoint_every: int = 50,
    resume: bool = False,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> WarmupResult:
    """Trains the indexers of an attached model, on the model's device.

    The model's own weights are not touched. Its indexers get what was learnt, in their dtype, at every checkpoint.
    A run that was stopped or killed and then resumed has the same losses as one that was not, to the last bit on the
    same machine with the same number of threads.

    Args:
        model: An attached model.
        stream: The training tokens.
        out: Folder of the run: the indexers, the state to resume from, and a log.
        settings: What to do.
        checkpoint_every: Steps between checkpoints; there is one at the beginning and one at the end too.
        resume: Continue the run in `out`.
        reporter: Told how it goes.
        should_stop: Asked after every step; if it says yes a checkpoint is written and the run ends.

    Raises:
        ValueError: The model is not attached or has no indexer, a setting or the data does not fit, the state is
            corrupt, or the run to resume is another one; the message names what differs.
        NotFiniteError: A loss or an activation became NaN or infinite; the message names layer and step.
        OSError: `out` is taken, or a file cannot be written; the last checkpoint is intact.
    """
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    run = _Run(model, stream, RunFolder(out), settings, reporter or Reporter())
    was_training = model.training
    model.eval()
    try:
        return run.go(checkpoint_every, resume, should_stop)
    finally:
        model.train(was_training)


class _Run:
    """One run: its layers' trainers and where it stands."""

    def __init__(
        self,
        model: PreTrainedModel,
        stream: TokenStream,
        folder: RunFolder,
        settings: WarmupSettings,
        reporter: Reporter,
    ) -> None:
        indexers = indexers_of(model)
        self.config = config_of(model)
        if not indexers:
            raise ValueError(
                f"{type(model).__name__} has no indexer to train: every layer is dense, shared or sliding; change "
                "DSAConfig.layers"
            )
        self.model = model
        self.settings = settings.resolved(self.config, list(indexers))
        self.windows = Windows(stream, settings.seq_len, settings.seed)
        self.folder = folder
        self.reporter = reporter
        self.layers = {
            layer: LayerTrainer(layer, indexer, self.config, self.settings) for layer, indexer in indexers.items()
        }
        self.step = 0
        self.seconds = 0.0
        self.kl: dict[int, float] = {}

    def go(self, checkpoint_every: int, resume: bool, should_stop: Callable[[], bool]) -> WarmupResult:
        if resume:
            self._resume()
        else:
            self.folder.open_new()
            self.folder.check_space(3 * state_bytes({n: dict(t.parameters) for n, t in self.layers.items()}))
            self._checkpoint()
        self.reporter.begin(self.step, self.settings.steps, list(self.layers))
        while self.step < self.settings.steps:
            began = time.perf_counter()
            lr = self.settings.lr_at(self.step + 0.5)
            self.kl = self._read_losses(self._train_on(self.windows(self.step)))
            self.step += 1
            self.seconds += time.perf_counter() - began
            record = StepRecord(self.step, self.step * self.settings.seq_len, lr, self.kl, self.seconds)
            self.folder.log(record)
            self.reporter.step(record)
            stopping = should_stop()
            if stopping or self.step % checkpoint_every == 0 or self.step == self.settings.steps:
                self._checkpoint()
            if stopping:
                break
        return WarmupResult(self.step, self.kl, self.folder.indexers_file)

    @torch.no_grad()
    def _train_on(self, window: torch.Tensor) -> dict[int, torch.Tensor]:
        """One forward of the frozen model; what each layer's updates returned."""
        queries: dict[int, torch.Tensor] = {}
        figures: dict[int, torch.Tensor] = {}

        def observe(call: AttentionCall) -> None:
            first = self.settings.first_query(self.config, call.layer)
            if first not in queries:
                queries[first] = self._draw(first, window.shape[1]).to(call.query.device)
            figures[call.layer] = self.layers[call.layer].train(call, queries[first], self.step)
            self.reporter.layer()

        self.model(
            input_ids=window.to(self.model.device),
            use_cache=False,
            logits_to_keep=1,
            dsa_context=DSAContext(mode="dense", observer=observe),
        )
        return figures

    def _draw(self, first: int, tokens: int) -> torch.Tensor:
        assert self.settings.queries_per_update is not None
        assert self.settings.updates_per_sequence is not None
        return draw_queries(
            first,
            tokens,
            self.settings.queries_per_update,
            self.settings.updates_per_sequence,
            seeded(self.settings.seed, self.step, first),
        )

    def _read_losses(self, figures: dict[int, torch.Tensor]) -> dict[int, float]:
        """The losses by layer: the one place of a step where the host waits for the device."""
        values = torch.stack(list(figures.values())).tolist()
        for layer, (loss, activations) in zip(figures, values):
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
                f"training stopped in step {self.step + 1}: {reason}. The checkpoint in {self.folder.path} is from "
                "before it"
            )
        return {layer: loss for layer, (loss, _) in zip(figures, values)}

    def _checkpoint(self) -> None:
        """The state first: the indexers can always be made again from it."""
        tensors = {layer: trainer.state() for layer, trainer in self.layers.items()}
        self.folder.save(TrainingState(self.step, self.seconds, self._identity(), tensors))
        self._publish()

    def _publish(self) -> None:
        for trainer in self.layers.values():
            trainer.write_back()
        save_indexers(self.model, self.folder.indexers_file)

    def _resume(self) -> None:
        state = self.folder.load()
        changed = list(differences(state.identity, self._identity()))
        if changed:
            raise ValueError(
                f"resume: the run in {self.folder.path} was another one: {'; '.join(changed)}. Give it what it was "
                "started with, or start a new run in another folder"
            )
        if set(state.tensors) != set(self.layers):
            raise ValueError(
                f"resume: {self.folder.state_file} is corrupt: it has the layers {sorted(state.tensors)}, the model "
                f"has indexers in {sorted(self.layers)}; start a new run in another folder"
            )
        for layer, trainer in self.layers.items():
            trainer.load_state(state.tensors[layer])
        self.step, self.seconds = state.step, state.seconds
        self.folder.cut_log(state.step)
        self._publish()

    def _identity(self) -> dict[str, Any]:
        """What decides the losses. The folder a model was loaded from does not."""
        model = describe_base_model(self.model)
        del model["name"]
        model["dtype"] = str(self.model.dtype).removeprefix("torch.")
        config = self.config
        return {
            "settings": self.settings.to_dict(),
            "config": {
                "index_heads": config.index_heads,
                "index_head_dim": config.index_head_dim,
                "rope_dim": config.rope_dim,
                "sinks": config.sinks,
                "local": {str(layer): config.layer_local(layer) for layer in self.layers},
            },
            "data": self.windows.stream.fingerprint,
            "model": model,
        }
