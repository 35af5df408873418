"""What every stage of training has in common: steps, checkpoints, resuming, measuring on held-out text.

A stage says what one step does and what its state is. All files are the main process's business; an error there is
raised in every process, so that none waits for one that has ended.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from dsa.config import DSAConfig
from dsa.models.attached import set_trained
from dsa.models.fingerprint import describe_base_model
from dsa.runs.files import write_atomically
from dsa.train.data import Windows
from dsa.train.options import RunOptions
from dsa.train.progress import HoldoutRecord, StepRecord
from dsa.train.settings import DenseSettings, SparseSettings, StageSettings, WarmupSettings
from dsa.train.sharding import Sharded
from dsa.train.state import RECIPE, RunFolder, TrainingState, differences, state_bytes

Result = TypeVar("Result")


class NotFiniteError(ValueError):
    """A loss or an activation became NaN or infinite. The last checkpoint is intact."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    Args:
        step: Steps finished; fewer than asked for where the run was stopped.
        kl: Loss of the last step by layer, in nats; empty if no step ran, and in the dense stage.
        indexers: The file for `dsa.attach(model, indexers=...)`; `None` after the dense stage.
        language: Language-modelling loss of the last step, in nats; not in the warm-up.
        model: The folder with what the stage made of the model: its adapter, or all of it; not in the warm-up.
    """

    step: int
    kl: dict[int, float]
    indexers: Path | None
    language: float | None = None
    model: Path | None = None


class Stage(ABC):
    """One run of one stage.

    Args:
        model: The model.
        config: What it is attached with; `None` for a stage that trains models without indexers.
        windows: What it reads.
        settings: What to do.
        folder: Where it writes.
        options: How it is run.
    """

    name: str

    def __init__(
        self,
        model: PreTrainedModel,
        config: DSAConfig | None,
        windows: Windows,
        settings: WarmupSettings | SparseSettings | DenseSettings,
        folder: RunFolder,
        options: RunOptions,
    ) -> None:
        size, sequences = options.processes.size, settings.sequences
        if sequences % size:
            raise ValueError(
                f"sequences={sequences} per step cannot be shared by {size} processes; use a multiple of {size}"
            )
        self.model = model
        self.config = config
        self.windows = windows
        self.settings = settings
        self.steps = settings.steps
        self.sequences = sequences
        self.folder = folder
        self.options = options
        self.processes = options.processes
        self.step = 0
        self.seconds = 0.0
        self.record: StepRecord | None = None
        self.sharded: Sharded | None = None
        # Taken before anything is changed: what the run began with.
        self.base_model = describe_base_model(model)
        self.dtype = str(model.dtype).removeprefix("torch.")

    def shard(self) -> None:
        """Shares the model's weights out, if the processes are to; everything that adds weights comes before."""
        if self.processes.shard:
            assert self.processes.device is not None
            self.sharded = Sharded(self.model, self.processes.device)

    def run_pass(self, function: Callable[[], Result]) -> Result:
        """Runs a function that calls the model."""
        return function() if self.sharded is None else self.sharded.run_pass(function)

    @abstractmethod
    def train_step(self, first: int, count: int) -> StepRecord:
        """Does step `self.step` on the windows `first` to `first + count - 1`; losses are means over processes.

        Raises:
            NotFiniteError: A loss or an activation became NaN or infinite.
        """

    @abstractmethod
    def parts(self) -> set[str]:
        """Names of the parts of the state."""

    @abstractmethod
    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Everything that the next step depends on, on the CPU, by part and name.

        Of a sharded model all processes call this together, and only the main one's answer is complete.
        """

    @abstractmethod
    def load_state(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Takes what `state` returned; `ValueError` where it does not fit."""

    @abstractmethod
    def sync_model(self) -> None:
        """Copies weights that are trained outside the model into it."""

    def collect(self, finished: bool) -> dict[str, dict[str, torch.Tensor]]:
        """What `publish` writes of a sharded model, by folder and name; called by all processes together."""
        return {}

    @abstractmethod
    def publish(self, finished: bool, weights: dict[str, dict[str, torch.Tensor]]) -> None:
        """Writes the result so far. Called in the main process only.

        Args:
            finished: Whether the run ends here.
            weights: What `collect` returned; nothing for a model that is not sharded.
        """

    @abstractmethod
    def expected_bytes(self) -> int:
        """Size of a checkpoint once every moment exists."""

    @abstractmethod
    def layers(self) -> list[int]:
        """The layers that are trained."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the losses and belongs to the stage: its settings."""

    @abstractmethod
    def memory_hints(self) -> list[str]:
        """Options that need less memory, each with how much less."""

    def run(self) -> None:
        """Runs the steps that are left.

        Raises:
            MemoryError: The device ran out of memory; the message says which settings lower what is needed.
        """
        try:
            self._run()
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in OUT_OF_MEMORY):
                raise
            reason = [*str(error).strip().splitlines(), "no reason given"][0]
            raise MemoryError(
                f"{self.model.device} ran out of memory in step {self.step + 1} ({reason}). What needs less: "
                f"{'; '.join(self._all_memory_hints())}"
            ) from error

    def _all_memory_hints(self) -> list[str]:
        found = self.memory_hints()
        if self.processes.size > 1 and self.sharded is None:
            found.append(f"--shard leaves each of the {self.processes.size} processes its share of the model's weights")
        if self.sharded is not None:
            found.append("more processes leave each a smaller share of the model's weights")
        return found

    def _run(self) -> None:
        options, folder = self.options, self.folder
        if options.resume:
            self._resume()
        else:
            self.processes.on_main(self._open_new)
            self._checkpoint()
        options.reporter.begin(self.step, self.steps, self.layers())
        if self.step == 0:
            self._measure()
        stopping = False
        while self.step < self.steps and not stopping:
            began = time.perf_counter()
            mine = self.sequences // self.processes.size
            first = self.step * self.sequences + self.processes.rank * mine
            self.record = record = self.train_step(first, mine)
            self.step += 1
            self.seconds += time.perf_counter() - began
            self.processes.on_main(lambda: folder.log(folder.log_file, record.to_dict()))  # noqa: B023
            options.reporter.step(record)
            stopping = self.processes.any(options.should_stop())
            last = self.step == self.steps
            if last or (options.holdout_every is not None and self.step % options.holdout_every == 0):
                self._measure()
            if stopping or last or self.step % options.checkpoint_every == 0:
                self._checkpoint(finished=stopping or last)

    def seconds_since(self, began: float) -> float:
        """Time spent in steps so far, the running one included."""
        return self.seconds + time.perf_counter() - began

    def _open_new(self) -> None:
        self.folder.open_new()
        self.folder.check_space(self.expected_bytes())
        if self.options.recipe is not None:
            write_atomically(self.folder.path / RECIPE, self.options.recipe.encode())

    def _measure(self) -> None:
        holdout = self.options.holdout
        if holdout is None:
            return
        self.sync_model()

        def read() -> HoldoutRecord:
            return self.run_pass(lambda: holdout.measure(self.model, self.config, self.step))

        # No process of a sharded model can read alone.
        read_by_all = None if self.sharded is None else read()

        def measure() -> None:
            record = read_by_all or read()
            self.folder.log(self.folder.holdout_file, record.to_dict())
            self.options.reporter.holdout(record)

        self.processes.on_main(measure)

    def _checkpoint(self, finished: bool = False) -> None:
        """The state first: the results can always be made again from it."""
        self.sync_model()
        # Not kept: of a sharded model the weights are gathered next, and both need not be in memory.
        self._save(None if self.sharded is None else self.state())
        self._publish(finished)

    def _save(self, gathered: dict[str, dict[str, torch.Tensor]] | None) -> None:
        def write() -> None:
            self.folder.check_space(self.expected_bytes(), copies=1)
            tensors = self.state() if gathered is None else gathered
            self.folder.save(TrainingState(self.step, self.seconds, self._identity(), tensors))

        self.processes.on_main(write)

    def _publish(self, finished: bool) -> None:
        if self.step and self.config is not None:
            set_trained(self.model, True)
        weights = {} if self.sharded is None else self.collect(finished)
        self.processes.on_main(lambda: self.publish(finished, weights))

    def _resume(self) -> None:
        folder = self.folder
        state = folder.load()
        changed = list(differences(state.identity, self._identity()))
        if changed:
            raise ValueError(
                f"resume: the run in {folder.path} was another one: {'; '.join(changed)}. Give it what it was "
                "started with, or start a new run in another folder"
            )
        expected = self.parts()
        if set(state.tensors) != expected:
            raise ValueError(
                f"resume: {folder.state_file} is corrupt: it has {sorted(state.tensors)}, the model trains "
                f"{sorted(expected)}; start a new run in another folder"
            )
        self.load_state(state.tensors)
        self.step, self.seconds = state.step, state.seconds
        self.sync_model()

        def clean() -> None:
            folder.clean()
            folder.cut_logs(state.step)

        self.processes.on_main(clean)
        self._publish(self.step == self.steps)

    def _identity(self) -> dict[str, Any]:
        """What decides the losses. The folder a model was loaded from does not."""
        model = {**self.base_model, "dtype": self.dtype}
        del model["name"]
        found = {"stage": self.name, **self.identity(), "data": self.windows.stream.fingerprint, "model": model}
        config = self.config
        if config is not None:
            found["config"] = {
                "index_heads": config.index_heads,
                "index_head_dim": config.index_head_dim,
                "rope_dim": config.rope_dim,
                "sinks": config.sinks,
                "local": {str(layer): config.layer_local(layer) for layer in self.layers()},
            }
        return found


OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def shorter_sequence_hint(settings: StageSettings, what: str = "activations") -> str:
    """The hint to read shorter sequences."""
    return f"--seq-len {settings.seq_len // 2} halves the {what}"


def narrower_weights_hints(model: PreTrainedModel) -> list[str]:
    """The hint to keep the weights of a frozen model in fewer bits, where they are in fp32."""
    if model.dtype != torch.float32:
        return []
    size = sum(each.numel() * each.itemsize for each in model.parameters())
    return [f"--dtype bfloat16 takes {size / 2e6:,.0f} MB less for the model's weights"]


def expected_state_bytes(parameters: dict[str, dict[str, torch.Tensor]]) -> int:
    """Size of weights with both moments of AdamW in fp32."""
    return 3 * state_bytes(parameters)
