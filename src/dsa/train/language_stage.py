"""What the stages have in common whose loss is language modelling: the parameters that learn, and their optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dsa.config import DSAConfig
from dsa.runs.files import replace_folder
from dsa.train.adam import load_state, state_of
from dsa.train.data import TokenStream, Windows, seeded
from dsa.train.language import predicted
from dsa.train.loop import NotFiniteError, Stage, expected_state_bytes
from dsa.train.options import RunOptions
from dsa.train.settings import BETAS, DenseSettings, SparseSettings
from dsa.train.sharding import gathered
from dsa.train.state import RunFolder
from dsa.train.trainable import TrainableParameters

MODEL = "model"


class LanguageStage(Stage):
    """One run in which parameters of the model learn from language modelling.

    Args:
        model: The model.
        config: What it is attached with, if it is.
        stream: The training tokens.
        settings: What to do.
        folder: Where the run writes.
        options: How it is run.
        tokenizer: Saved with the model.
    """

    settings: SparseSettings | DenseSettings

    def __init__(
        self,
        model: PreTrainedModel,
        config: DSAConfig | None,
        stream: TokenStream,
        settings: SparseSettings | DenseSettings,
        folder: RunFolder,
        options: RunOptions,
        tokenizer: Any = None,
    ) -> None:
        windows = Windows(stream, settings.seq_len, settings.seed, boundaries=settings.boundaries)
        super().__init__(model, config, windows, settings, folder, options)
        self.tokenizer = tokenizer
        self.trainable = TrainableParameters(model, settings)
        self.trainable.follow(self.shard)
        self.optimizer = torch.optim.AdamW(
            self.trainable.parameters.values(), lr=settings.peak_lr, betas=BETAS, weight_decay=0.0
        )

    @contextmanager
    def training(self) -> Iterator[None]:
        """Puts the model into training mode while the context is open, and afterwards back."""
        model, settings = self.model, self.settings
        was_training, recomputes = model.training, model.is_activation_checkpointing
        if settings.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        try:
            yield
        finally:
            if settings.gradient_checkpointing and not recomputes:
                model.activation_checkpointing_disable()
            model.train(was_training)
            self.trainable.unfreeze()

    def begin_step(self, first: int) -> float:
        """What a sum over the predictions of one process is multiplied with, for the mean over all of a step's.

        Args:
            first: This process's first window.
        """
        step_first = self.step * self.sequences
        # Dropout, where a model has it, depends on the step alone, so that a resumed run repeats it.
        torch.manual_seed(int(seeded(self.settings.seed, self.step, first).initial_seed()))
        predictions = sum(int(predicted(self.windows(step_first + each)).sum()) for each in range(self.sequences))
        return self.processes.size / max(1, predictions)

    def tokens_after_step(self) -> int:
        """Tokens read once the running step is finished."""
        return (self.step + 1) * self.sequences * self.settings.seq_len

    def precision(self, keep_casts: bool = True) -> Any:
        """The context in which the model computes."""
        if self.settings.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.model.device.type, torch.bfloat16, cache_enabled=keep_casts)

    def update_model(self) -> None:
        """One step of the optimizer with the gradients of all processes."""
        parameters = self.trainable.parameters.values()
        # FSDP has averaged those of a sharded model.
        if self.sharded is None:
            self.processes.mean_(each.grad for each in parameters if each.grad is not None)
        norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm, gathered(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_now(self.settings.peak_lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def lr_now(self, peak: float) -> float:
        """Learning rate in the middle of the running step."""
        return self.settings.scheduled(peak, self.step + 0.5)

    def check_finite(self, language: float) -> None:
        """Ends training where the loss is NaN or infinite."""
        if not math.isfinite(language):
            self.stop(f"the language-modelling loss became {language}: lower --lr ({self.settings.peak_lr})")

    def stop(self, reason: str) -> None:
        """Raises `NotFiniteError` with a reason."""
        raise NotFiniteError(
            f"training stopped in step {self.step + 1}: {reason}. The checkpoint in {self.folder.path} is from before "
            "it"
        )

    def parts(self) -> set[str]:
        return {MODEL}

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        return {MODEL: state_of(dict(self.trainable.parameters), self.optimizer, keep=self.processes.is_main)}

    def load_state(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        load_state(dict(self.trainable.parameters), self.optimizer, tensors[MODEL], "the model")

    def expected_bytes(self) -> int:
        return expected_state_bytes({MODEL: dict(self.trainable.parameters)})

    def trained_megabytes(self) -> float:
        """Size of the trainable weights."""
        return sum(each.numel() * each.itemsize for each in self.trainable.parameters.values()) / 1e6

    def checkpointing_hints(self) -> list[str]:
        """The hint to compute activations twice, where it is not done yet."""
        if self.settings.gradient_checkpointing:
            return []
        layers = self.model.config.get_text_config().num_hidden_layers
        return [f"--gradient-checkpointing keeps about 1/{layers} of the layers' activations"]

    def save_model(self, weights: dict[str, torch.Tensor] | None) -> None:
        """Writes the model with its tokenizer to the run's folder.

        Args:
            weights: Those of a sharded model; `None` takes the model's own.
        """

        def save(path: Path) -> None:
            self.model.save_pretrained(path, state_dict=weights)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(path)

        replace_folder(self.folder.path / MODEL, save)
