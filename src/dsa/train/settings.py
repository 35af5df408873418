"""What a run of each stage is told to do, validated, and the learning rates that follow from it.

`dsa train` makes its options from these classes: their fields' types, defaults and entries under `Args:`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dsa.config import DSAConfig
from dsa.train.schedule import (
    Schedule,
    check_schedule,
    default_decay,
    default_warmup,
    factor_at,
    require_int,
    require_positive,
)

Target = Literal["far", "paper"]
Start = Literal["random", "fitted"]
Precision = Literal["no", "bf16"]

BETAS = (0.9, 0.95)
QUERIES_PER_UPDATE = 64
LORA_LR = 1e-4
PARAMETERS_LR = 1e-5

LEAST_HEADS, LEAST_HEAD_DIM = 2, 4
"""What a fitted start needs: a ReLU and its negative make a score, and two dims of a key hold its length."""


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """What the stages have in common. The same settings, model and data give the same losses.

    Args:
        steps: Steps; each reads `sequences` sequences.
        seq_len: Tokens per sequence.
        warmup_steps: Steps of linear warm-up; by default a fiftieth of all.
        schedule: What follows the warm-up: `"cosine"` falls to zero, `"wsd"` stays and falls linearly to zero in the
            last `decay_steps`, `"constant"` stays.
        decay_steps: The end of `"wsd"`; by default a fifth of all.
        max_grad_norm: Gradients are clipped to this norm.
        sequences: Sequences per step, shared by the processes of a run.
        seed: Of the first weights, of the order of the data, and of the draws of queries.
        boundaries: Tokens attend within their own document, and positions start again with each; otherwise a sequence
            is read as one text.
    """

    steps: int
    seq_len: int = 2048
    warmup_steps: int | None = None
    schedule: Schedule = "cosine"
    decay_steps: int | None = None
    max_grad_norm: float = 1.0
    sequences: int = 1
    seed: int = 0
    boundaries: bool = True

    def check(self, peak_lr: float, name: str = "lr") -> None:
        """Refuses values out of range.

        Args:
            peak_lr: The peak learning rate.
            name: What messages call it.

        Raises:
            ValueError: The message names the setting, what was expected and what came.
        """
        for field, minimum in (("steps", 1), ("seq_len", 2), ("seed", 0), ("sequences", 1)):
            require_int(field, getattr(self, field), minimum)
        require_positive("max_grad_norm", self.max_grad_norm)
        check_schedule(self.schedule, peak_lr, self.steps, self.warmup_steps, self.decay_steps, name=name)

    def to_dict(self) -> dict[str, Any]:
        """What decides the losses, in plain JSON types."""
        return dataclasses.asdict(self)

    @property
    def schedule_steps(self) -> tuple[int, int | None]:
        """Steps of warm-up and of decay, with what follows from `None`."""
        warmup = default_warmup(self.steps) if self.warmup_steps is None else self.warmup_steps
        return warmup, self.decay_steps or default_decay(self.schedule, self.steps, warmup)

    def scheduled(self, peak_lr: float, step: float) -> float:
        """The learning rate at a step, fractions of a step included.

        Args:
            peak_lr: The peak learning rate.
            step: Steps done.
        """
        return peak_lr * factor_at(step, self.schedule, self.steps, *self.schedule_steps)


@dataclass(frozen=True, kw_only=True)
class IndexerSettings(StageSettings):
    """What the stages have in common that train indexers.

    Args:
        queries_per_update: Queries of a sequence that one optimizer step of a layer learns from, drawn at random; by
            default 64 (on a GPU try 512) or all of a shorter sequence, and in the sparse stage all.
        target: `"far"` learns what has to be selected: sinks and local window are left out of both distributions.
            `"paper"` learns all causal positions (arXiv 2512.02556, eq. 3).
    """

    queries_per_update: int | None = None
    target: Target = "far"

    def check(self, peak_lr: float, name: str = "lr") -> None:
        super().check(peak_lr, name)
        if self.queries_per_update is not None:
            require_int("queries_per_update", self.queries_per_update, 1)
        _require_choice("target", self.target, Target)

    def always_read(self, config: DSAConfig, layer: int) -> tuple[int, int]:
        """How many sinks and local tokens the loss leaves out in this layer."""
        return (config.sinks, config.layer_local(layer)) if self.target == "far" else (0, 0)


@dataclass(frozen=True, kw_only=True)
class LanguageSettings(StageSettings):
    """What the stages have in common in which parameters of the model learn from language modelling.

    Args:
        parameters: Train the parameters whose names this regular expression finds; the dense stage trains all without
            it.
        mixed_precision: `"bf16"` computes in bf16 with the parameters as they are.
        gradient_checkpointing: Keep no activations within layers, and compute them again in the backward pass: less
            memory, more time.
    """

    parameters: str | None = None
    mixed_precision: Precision = "no"
    gradient_checkpointing: bool = False

    def check(self, peak_lr: float, name: str = "lr") -> None:
        super().check(peak_lr, name)
        _require_choice("mixed_precision", self.mixed_precision, Precision)

    def to_dict(self) -> dict[str, Any]:
        """What decides the losses, in plain JSON types; recomputing activations does not."""
        plain = super().to_dict()
        del plain["gradient_checkpointing"]
        return plain


@dataclass(frozen=True, kw_only=True)
class WarmupSettings(IndexerSettings):
    """How the indexers of a frozen model are trained.

    In each step the model reads `sequences` sequences, which train all layers; each update learns from all of them.
    Many small updates learn more from the same tokens than few large ones. A GPU is hardly busy with 64 queries; there
    512 with more updates pays.

    Args:
        lr: Peak learning rate of AdamW (betas 0.9 and 0.95, no weight decay).
        updates_per_sequence: Optimizer steps per layer and step of the warm-up; by default every query is used about
            once.
        start: What new indexers begin with: `"random"` weights, or weights `"fitted"` in closed form to what each
            layer attends to in the first sequence (`dsa.train.start`).

    Raises:
        ValueError: A value is out of range.
    """

    lr: float = 1e-2
    updates_per_sequence: int | None = None
    start: Start = "random"

    def __post_init__(self) -> None:
        self.check(self.lr)
        _require_choice("start", self.start, Start)
        if self.updates_per_sequence is not None:
            require_int("updates_per_sequence", self.updates_per_sequence, 1)

    @property
    def indexer_lr(self) -> float:
        """Peak learning rate of the indexers."""
        return self.lr

    def resolved(self, config: DSAConfig, layers: list[int]) -> WarmupSettings:
        """These settings with every `None` replaced, for a model whose indexers are in `layers`.

        Raises:
            ValueError: The sequences are so short that a layer would have nothing to learn from, or an update
                asks for more queries than a sequence has.
        """
        if self.start == "fitted" and (config.index_heads < LEAST_HEADS or config.index_head_dim < LEAST_HEAD_DIM):
            raise ValueError(
                f"start='fitted' needs at least {LEAST_HEADS} index heads of {LEAST_HEAD_DIM} dims, got "
                f"{config.index_heads} of {config.index_head_dim}; use start='random' or larger indexers"
            )
        eligible = {layer: self.seq_len - self.first_query(config, layer) for layer in layers}
        layer, fewest = min(eligible.items(), key=lambda item: item[1])
        if fewest < 1:
            first = self.first_query(config, layer)
            raise ValueError(
                f"seq_len={self.seq_len} leaves layer {layer} nothing to learn: with {config.sinks} sinks and a local "
                f"window of {config.layer_local(layer)}, queries before {first} have at most one token to "
                f"choose from; use a seq_len well over {first}"
            )
        queries = self.queries_per_update or min(QUERIES_PER_UPDATE, fewest)
        if queries > fewest:
            raise ValueError(
                f"queries_per_update={queries} is more than the {fewest} queries of a sequence that learn something in "
                f"layer {layer}; use at most {fewest}, or a longer seq_len"
            )
        warmup, decay = self.schedule_steps
        return dataclasses.replace(
            self,
            warmup_steps=warmup,
            decay_steps=decay,
            queries_per_update=queries,
            updates_per_sequence=self.updates_per_sequence or max(1, round(fewest / queries)),
        )

    def first_query(self, config: DSAConfig, layer: int) -> int:
        """The first query of a sequence that has at least two tokens to compare in this layer."""
        sinks, local = self.always_read(config, layer)
        return sinks + local + 1

    def lr_at(self, step: float) -> float:
        """Learning rate at a step, fractions of a step included."""
        return self.scheduled(self.lr, step)


@dataclass(frozen=True, kw_only=True)
class SparseSettings(IndexerSettings, LanguageSettings):
    """How a model is trained to live with its selection, and its indexers with it.

    Exactly one of `lora`, `all_parameters` and `parameters` says what learns from the language-modelling loss. The
    sequences of a step are read one at a time.

    Args:
        lora: Train low-rank adapters (PEFT) of this rank on every linear layer of the decoder.
        all_parameters: Train every parameter of the model.
        lora_alpha: The adapters' output is scaled by this over the rank; by default twice the rank.
        lr: Peak learning rate of the model's AdamW; by default 1e-4 for adapters, 1e-5 for parameters.
        indexer_lr: Peak learning rate of the indexers.
        distill: Weight of the divergence from the dense model's predictions, added to the language-modelling loss.

    Raises:
        ValueError: A value is out of range, or not exactly one of the three is given.
    """

    lora: int | None = None
    all_parameters: bool = False
    lora_alpha: float | None = None
    lr: float | None = None
    indexer_lr: float = 1e-3
    distill: float = 0.0

    def __post_init__(self) -> None:
        trained = [self.lora is not None, self.all_parameters, self.parameters is not None]
        if sum(trained) != 1:
            raise ValueError(
                "the sparse stage trains one of: --lora RANK, --all-parameters, --parameters PATTERN; "
                f"got {sum(trained)} of them"
            )
        if self.lora is not None:
            require_int("lora", self.lora, 1)
        if self.lora_alpha is not None:
            require_positive("lora_alpha", self.lora_alpha)
            if self.lora is None:
                raise ValueError(f"lora_alpha={self.lora_alpha} has no meaning without lora")
        if isinstance(self.distill, bool) or not isinstance(self.distill, (int, float)) or not 0 <= self.distill < 1e6:
            raise ValueError(f"distill must be a number of at least 0, got {self.distill!r}")
        self.check(self.indexer_lr, "indexer_lr")
        self.check(self.peak_lr)

    @property
    def peak_lr(self) -> float:
        """The model's peak learning rate."""
        if self.lr is not None:
            return self.lr
        return LORA_LR if self.lora is not None else PARAMETERS_LR


@dataclass(frozen=True, kw_only=True)
class DenseSettings(LanguageSettings):
    """How a model is trained with full attention, before it has indexers or as a control of the sparse stage.

    The sequences of a step are read one at a time.

    Args:
        lr: Peak learning rate of AdamW (betas 0.9 and 0.95, no weight decay).
        expert_bias_rate: How far a step moves the biases with which routers select experts, towards equal load; 0
            leaves them, DeepSeek-V3 used 0.001.

    Raises:
        ValueError: A value is out of range.
    """

    lr: float = PARAMETERS_LR
    expert_bias_rate: float = 0.0

    def __post_init__(self) -> None:
        rate = self.expert_bias_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(f"expert_bias_rate must be a number from 0 to below 1, got {rate!r}; 0.001 is usual")
        self.check(self.lr)

    @property
    def peak_lr(self) -> float:
        """The model's peak learning rate."""
        return self.lr


def _require_choice(name: str, given: object, choices: Any) -> None:
    if given not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {given!r}")
