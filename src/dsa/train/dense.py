"""Dense stage: the model learns language modelling with full attention.

It comes before indexers: the model has random weights, or is trained on. It is also the control of the sparse stage:
with the same settings it reads the same windows in the same order.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dsa.models import is_attached
from dsa.train.data import TokenStream, Window
from dsa.train.experts import ExpertBalance
from dsa.train.language import language_losses, read_window
from dsa.train.language_stage import MODEL, LanguageStage
from dsa.train.loop import TrainingResult, shorter_sequence_hint
from dsa.train.options import RunOptions
from dsa.train.progress import StepRecord
from dsa.train.settings import DenseSettings
from dsa.train.state import RunFolder

EXPERTS = "experts"


def train_dense(
    model: PreTrainedModel,
    stream: TokenStream,
    out: str | Path,
    settings: DenseSettings,
    options: RunOptions | None = None,
    *,
    tokenizer: Any = None,
) -> TrainingResult:
    """Trains a model that is not attached, with full attention, on the model's device.

    `out` gets `state.safetensors`, `log.jsonl`, and at the end `model`, which `from_pretrained` loads. The model keeps
    what it learnt.

    Args:
        model: A causal language model, not attached.
        stream: The training tokens.
        out: Folder of the run.
        settings: What to do.
        options: How it is run; `None` means the defaults of `RunOptions`. Of held-out text the loss is measured.
        tokenizer: Saved with the model.

    Raises:
        ValueError, NotFiniteError, OSError: As `train_indexers`; and where the model is attached.
    """
    stage = DenseStage(model, stream, settings, RunFolder(out), options or RunOptions(), tokenizer)
    with stage.training(), stage.balance.watching():
        stage.run()
    language = stage.record.language if stage.record else None
    return TrainingResult(stage.step, {}, None, language, stage.folder.path / MODEL)


class DenseStage(LanguageStage):
    """One run: the model's optimizer, and the load of its experts."""

    name = "dense"
    settings: DenseSettings

    def __init__(
        self,
        model: PreTrainedModel,
        stream: TokenStream,
        settings: DenseSettings,
        folder: RunFolder,
        options: RunOptions,
        tokenizer: Any = None,
    ) -> None:
        if is_attached(model):
            raise ValueError(
                f"{type(model).__name__} is attached; the dense stage trains it without indexers: dsa.detach(model) "
                "first, or train_sparse"
            )
        super().__init__(model, None, stream, settings, folder, options, tokenizer)
        self.balance = ExpertBalance(model, settings.expert_bias_rate, self.processes)

    def train_step(self, first: int, count: int) -> StepRecord:
        began = time.perf_counter()
        share = self.begin_step(first)
        loss = torch.zeros((), device=self.model.device)
        for number in range(first, first + count):
            loss += self._backward(self.windows(number), share)
        self.processes.mean_([loss])
        language = float(loss)
        self.check_finite(language)
        lr = self.lr_now(self.settings.peak_lr)
        self.update_model()
        self.balance.update()
        return StepRecord(self.step + 1, self.tokens_after_step(), lr, {}, self.seconds_since(began), language)

    def _backward(self, window: Window, share: float) -> torch.Tensor:
        """Adds one sequence's gradients; its loss times `share`, fp32."""

        def read() -> torch.Tensor:
            return language_losses(self.model, read_window(self.model, window, None), window)[0]

        with self.precision():
            loss = self.run_pass(read)
        (loss * share).backward()
        return loss.detach() * share

    def layers(self) -> list[int]:
        return []

    def identity(self) -> dict[str, Any]:
        return {"settings": self.settings.to_dict()}

    def parts(self) -> set[str]:
        return super().parts() | ({EXPERTS} if self.balance.biases else set())

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        biases = {name: bias.cpu().clone() for name, bias in self.balance.biases.items()}
        return super().state() | ({EXPERTS: biases} if biases else {})

    def load_state(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        super().load_state(tensors)
        self.balance.load(tensors.get(EXPERTS, {}))

    def sync_model(self) -> None:
        """Nothing to copy: the model's own parameters are trained."""

    def memory_hints(self) -> list[str]:
        found = self.checkpointing_hints()
        return [*found, shorter_sequence_hint(self.settings, "rest of them" if found else "activations")]

    def collect(self, finished: bool) -> dict[str, dict[str, torch.Tensor]]:
        assert self.sharded is not None
        return {MODEL: self.sharded.state_dict(self.processes.is_main)} if finished else {}

    def publish(self, finished: bool, weights: dict[str, dict[str, torch.Tensor]]) -> None:
        if finished:
            self.save_model(weights.get(MODEL))
