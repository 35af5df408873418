"""Dense stage: the model learns language modelling with full attention.

What comes before indexers: a model from random weights, or one trained on. Beside the sparse stage it is the dense
continuation: with the same settings it reads the same windows in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dsa.models import is_attached
from dsa.train.data import TokenStream, Window
from dsa.train.experts import ExpertBalance
from dsa.train.holdout import Holdout
from dsa.train.language import language_losses, read_window
from dsa.train.language_stage import MODEL, LanguageStage
from dsa.train.loop import Surroundings, TrainingResult, sequence_savings
from dsa.train.processes import Processes
from dsa.train.progress import Reporter, StepRecord
from dsa.train.settings import DenseSettings
from dsa.train.state import RunFolder

EXPERTS = "experts"


def train_dense(
    model: PreTrainedModel,
    stream: TokenStream,
    out: str | Path,
    settings: DenseSettings,
    *,
    tokenizer: Any = None,
    checkpoint_every: int = 50,
    resume: bool = False,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
    holdout: Holdout | None = None,
    holdout_every: int | None = None,
    recipe: str | None = None,
) -> TrainingResult:
    """Trains a model that is not attached, with full attention, on the model's device.

    `out` gets `state.safetensors`, `log.jsonl`, and at the end `model`, which `from_pretrained` loads. The model keeps
    what it learnt.

    Args:
        model: A causal language model, not attached.
        stream: The training tokens.
        out: Folder of the run.
        settings: What to do.
        tokenizer: Saved with the model.
        checkpoint_every, resume, reporter, should_stop, processes, holdout, holdout_every, recipe: As
            `train_indexers`; of held-out text the loss is measured.

    Raises:
        ValueError, NotFiniteError, OSError: As `train_indexers`; and where the model is attached.
    """
    around = Surroundings(
        RunFolder(out),
        reporter or Reporter(),
        processes or Processes(),
        checkpoint_every,
        holdout,
        holdout_every,
        should_stop,
        recipe,
    )
    run = DenseStage(model, stream, settings, around, tokenizer)
    with run.training(), run.balance.watching():
        run.go(resume)
    language = run.record.language if run.record else None
    return TrainingResult(run.step, {}, None, language, around.folder.path / MODEL)


class DenseStage(LanguageStage):
    """One run: the model's optimizer, and the load of its experts."""

    name = "dense"
    settings: DenseSettings

    def __init__(
        self,
        model: PreTrainedModel,
        stream: TokenStream,
        settings: DenseSettings,
        around: Surroundings,
        tokenizer: Any = None,
    ) -> None:
        if is_attached(model):
            raise ValueError(
                f"{type(model).__name__} is attached; the dense stage trains it without indexers: dsa.detach(model) "
                "first, or train_sparse"
            )
        super().__init__(model, None, stream, settings, around, tokenizer)
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
            loss = self.whole(read)
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

    def give_back(self) -> None:
        """What learns stands in the model."""

    def savings(self) -> list[str]:
        found = self.checkpointing_savings()
        return [*found, sequence_savings(self.settings, "rest of them" if found else "activations")]

    def collect(self, finished: bool) -> dict[str, dict[str, torch.Tensor]]:
        assert self.sharded is not None
        return {MODEL: self.sharded.state_dict(self.processes.is_main)} if finished else {}

    def publish(self, finished: bool, weights: dict[str, dict[str, torch.Tensor]]) -> None:
        if finished:
            self.save_model(weights.get(MODEL))
