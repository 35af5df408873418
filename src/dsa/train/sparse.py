"""Sparse stage: the model reads with its selection on, and learns to live with it.

Two losses, which never mix (arXiv 2512.02556, section 2): the trainable parameters of the model learn from language
modelling; the indexers learn from the divergence between attention and index scores over what was selected. The
indexers learn while the forward pass goes by, from detached tensors, in copies that stand outside the model; the
selection has no gradient. So no gradient of either loss has a way to the other's parameters.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dsa.config import DSAConfig
from dsa.models import config_of
from dsa.models.checkpoint import save_indexers
from dsa.models.context import AttentionCall, DSAContext
from dsa.models.fingerprint import describe_base_model
from dsa.runs.files import replace_folder
from dsa.train.data import TokenStream, Window, seeded
from dsa.train.language import language_losses, read_window
from dsa.train.language_stage import MODEL, LanguageStage
from dsa.train.layer import LayerTrainer, draw_queries
from dsa.train.loop import (
    TrainingResult,
    expected_state_bytes,
    narrower_weights_hints,
    shorter_sequence_hint,
)
from dsa.train.options import RunOptions
from dsa.train.progress import Reporter, StepRecord
from dsa.train.settings import SparseSettings
from dsa.train.sharding import gathered
from dsa.train.state import RunFolder
from dsa.train.warmup import layer_parts, layer_states, load_layer_states, trainable_indexers

ADAPTER = "adapter"


def train_sparse(
    model: PreTrainedModel,
    stream: TokenStream,
    out: str | Path,
    settings: SparseSettings,
    options: RunOptions | None = None,
    *,
    tokenizer: Any = None,
    merge: bool = False,
) -> TrainingResult:
    """Trains an attached model with its selection on, on the model's device.

    `out` gets what `train_indexers` writes, and `adapter`, a PEFT adapter, at every checkpoint of a run with
    `lora`; or `model`, which `from_pretrained` loads sparse, at the end. The model keeps what it learnt; adapters stay
    in it unless they are merged.

    Args:
        model: An attached model with trained indexers.
        stream: The training tokens.
        out: Folder of the run.
        settings: What to do.
        options: How it is run; `None` means the defaults of `RunOptions`.
        tokenizer: Saved with the model.
        merge: Write `model` for a run with `lora` too, with the adapters merged into the weights.

    Raises:
        ValueError, NotFiniteError, OSError: As `train_indexers`.
        ImportError: Adapters need the package `peft`.
    """
    stage = SparseStage(
        model, stream, settings, RunFolder(out), options or RunOptions(), tokenizer=tokenizer, merge=merge
    )
    with stage.training():
        stage.run()
    record = stage.record
    return TrainingResult(
        stage.step,
        record.kl if record else {},
        stage.folder.indexers_file,
        record.language if record else None,
        stage.result_folder(),
    )


class SparseStage(LanguageStage):
    """One run: the model's optimizer and its layers' trainers."""

    name = "sparse"
    config: DSAConfig
    settings: SparseSettings

    def __init__(
        self,
        model: PreTrainedModel,
        stream: TokenStream,
        settings: SparseSettings,
        folder: RunFolder,
        options: RunOptions,
        *,
        tokenizer: Any = None,
        merge: bool = False,
    ) -> None:
        indexers = trainable_indexers(model)
        config = config_of(model)
        self.merge = merge
        self.base_model_now: dict[str, Any] | None = None
        super().__init__(model, config, stream, settings, folder, options, tokenizer)
        self.trainers = {
            layer: LayerTrainer(layer, indexer, config, settings, self.processes) for layer, indexer in indexers.items()
        }
        self.dense_weights = self.trainable.clone() if settings.distill else {}
        self.dense_head: dict[str, torch.Tensor] = {}

    def train_step(self, first: int, count: int) -> StepRecord:
        began = time.perf_counter()
        share = self.begin_step(first)
        losses = torch.zeros(2, device=self.model.device)
        kl = {layer: torch.zeros((), device=self.model.device) for layer in self.trainers}
        for number in range(first, first + count):
            losses += self._backward(self.windows(number), number, share, 1 / count, kl)
        together = torch.cat((losses, torch.stack(list(kl.values()))))
        self.processes.mean_([together])
        language, distillation, *by_layer = together.tolist()
        by_number = dict(zip(kl, by_layer))
        self._check_finite(language + distillation, by_number)
        self._update()
        return StepRecord(
            self.step + 1,
            self.tokens_after_step(),
            self.lr_now(self.settings.peak_lr),
            by_number,
            self.seconds_since(began),
            language,
            distillation if self.settings.distill else None,
        )

    def _backward(
        self, window: Window, number: int, share: float, layer_share: float, kl: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        """Adds one sequence's gradients everywhere; its losses times `share`, fp32 `[2]`."""
        dense = self._read_dense(window)
        learning = _IndexersLearn(self.trainers, self._draw(window, number), layer_share, kl, self.options.reporter)

        def read() -> torch.Tensor:
            output = read_window(self.model, window, DSAContext(observer=learning))
            learning.closed = True
            losses = language_losses(
                self.model,
                output,
                window,
                teacher_hidden=None if dense is None else dense.last_hidden_state,
                teacher=None if dense is None else lambda hidden, ids: self._dense_logits(dense, hidden, ids),
            )
            return torch.stack(losses)

        with self.precision():
            language, distillation = self.run_pass(read)
        ((language + self.settings.distill * distillation) * share).backward()
        return torch.stack((language, distillation)).detach() * share

    @torch.no_grad()
    def _read_dense(self, window: Window) -> Any:
        """What the model that the run began with makes of a window with full attention."""
        if not self.settings.distill:
            return None
        if self.sharded is not None:
            # The head is needed while the model that learns is put together, and parts cannot be gathered then.
            names = [name for name in self.sharded.outside_layers if name in self.dense_weights]
            self.dense_head = {name: gathered(self.dense_weights[name]) for name in names}
        self.model.eval()
        try:
            with self.trainable.replaced_by(self.dense_weights), self.precision():
                return self.run_pass(lambda: read_window(self.model, window, DSAContext(mode="dense")))
        finally:
            self.model.train()

    def _dense_logits(self, dense: Any, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        from dsa.models.decoder import head_logits

        # Autocast knows a weight that it has cast by its parameter, and would not see that the values are others.
        values = self.dense_weights if self.sharded is None else self.dense_head
        with self.trainable.replaced_by(values), self.precision(keep_casts=False):
            return head_logits(self.model, dense, hidden, ids)[0]

    def _draw(self, window: Window, number: int) -> torch.Tensor:
        """Queries `[1, Q]` that the indexers learn from."""
        tokens = self.settings.seq_len
        wanted = self.settings.queries_per_update
        if wanted is None or wanted >= tokens:
            return torch.arange(tokens, device=self.model.device)[None]
        generator = seeded(self.settings.seed, number, 0)
        return draw_queries(torch.arange(tokens), wanted, 1, generator).to(self.model.device)

    def _update(self) -> None:
        self.update_model()
        for trainer in self.trainers.values():
            trainer.update(self.lr_now(self.settings.indexer_lr))
        # The next step selects with what was just learnt.
        self.sync_model()

    def _check_finite(self, language: float, kl: dict[int, float]) -> None:
        for layer, value in kl.items():
            if not math.isfinite(value):
                self.stop(
                    f"the indexer loss of layer {layer} became {value}: lower --indexer-lr "
                    f"({self.settings.indexer_lr}) or --lr ({self.settings.peak_lr})"
                )
        self.check_finite(language)

    def layers(self) -> list[int]:
        return list(self.trainers)

    def identity(self) -> dict[str, Any]:
        budget = {str(layer): self.config.layer_top_k(layer) for layer in self.trainers}
        return {"settings": self.settings.to_dict(), "top_k": budget}

    def parts(self) -> set[str]:
        return super().parts() | layer_parts(self.trainers)

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        return {**super().state(), **layer_states(self.trainers)}

    def load_state(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        super().load_state(tensors)
        load_layer_states(self.trainers, tensors)

    def sync_model(self) -> None:
        for trainer in self.trainers.values():
            trainer.write_back()

    def memory_hints(self) -> list[str]:
        settings = self.settings
        trained, found = self.trained_megabytes(), self.checkpointing_hints()
        found.append(shorter_sequence_hint(settings, "rest of them" if found else "activations"))
        if settings.lora is None:
            found.append(f"--lora 16 takes nearly all of the {3 * trained:,.0f} MB of gradients and moments away")
        else:
            found += narrower_weights_hints(self.model)
        if settings.distill:
            found.append(f"no --distill takes {trained:,.0f} MB and the dense pass away")
        if settings.queries_per_update is None:
            found.append("--queries-per-update 1024 limits what the indexers' loss holds")
        return found

    def expected_bytes(self) -> int:
        layers: dict[str, dict[str, torch.Tensor]] = {f"{n}": dict(t.parameters) for n, t in self.trainers.items()}
        return super().expected_bytes() + expected_state_bytes(layers)

    def result_folder(self) -> Path:
        """Where the model, or its adapter, is written."""
        return self.folder.path / (MODEL if self._writes_model() else ADAPTER)

    def collect(self, finished: bool) -> dict[str, dict[str, torch.Tensor]]:
        assert self.sharded is not None
        keep = self.processes.is_main
        self.base_model_now = describe_base_model(self.model)
        weights: dict[str, dict[str, torch.Tensor]] = {}
        if self.trainable.adapter is not None:
            adapter = {name: gathered(each.detach()) for name, each in self.trainable.parameters.items()}
            # As PEFT names what stands in a model of its own.
            weights[ADAPTER] = {f"base_model.model.{name}": each.cpu() for name, each in adapter.items()}
        if finished and self._writes_model():
            whole = self.sharded.state_dict(keep)
            weights[MODEL] = self.trainable.merged(whole) if keep else {}
        return weights

    def _writes_model(self) -> bool:
        return self.settings.lora is None or self.merge

    def publish(self, finished: bool, weights: dict[str, dict[str, torch.Tensor]]) -> None:
        folder = self.folder
        save_indexers(self.model, folder.indexers_file, base_model=self.base_model_now)
        if self.trainable.adapter is not None:
            # No embedding is trained; PEFT would ask the Hub for the base model's vocabulary to find out.
            save_adapter = partial(
                self.trainable.adapter.save_pretrained, save_embedding_layers=False, state_dict=weights.get(ADAPTER)
            )
            replace_folder(folder.path / ADAPTER, save_adapter)
        if not finished or not self._writes_model():
            return
        if self.sharded is None:
            self.trainable.merge()
        self.save_model(weights.get(MODEL))


class _IndexersLearn:
    """The observer of one forward: every indexer learns from its layer's selection as the pass goes by.

    Under gradient checkpointing the layers run again in the backward pass; by then the observer is closed, so nothing
    is counted twice.
    """

    def __init__(
        self,
        trainers: dict[int, LayerTrainer],
        rows: torch.Tensor,
        share: float,
        kl: dict[int, torch.Tensor],
        reporter: Reporter,
    ) -> None:
        self.trainers = trainers
        self.rows = rows
        self.share = share
        self.kl = kl
        self.reporter = reporter
        self.closed = False

    def __call__(self, call: AttentionCall) -> None:
        if self.closed:
            return
        # Checkpointing has hooks on what autograd saves; this graph is used up before the layer ends.
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            loss = self.trainers[call.layer].accumulate(call, self.rows, self.share)
        self.kl[call.layer] += loss * self.share
        self.reporter.layer()


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
