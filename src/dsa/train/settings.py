"""What a run of each stage is told to do, validated, and the learning rates that follow from it."""

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

BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
QUERIES_PER_UPDATE = 64

LEAST_HEADS, LEAST_HEAD_DIM = 2, 4
"""What a fitted start needs: a ReLU and its negative make a score, and two dims of a key hold its length."""


@dataclass(frozen=True)
class WarmupSettings:
    """How the indexers are trained. The same settings, model and data give the same losses.

    Args:
        steps: Steps; in each the frozen model reads `sequences` sequences, which train all layers.
        seq_len: Tokens per sequence.
        lr: Peak learning rate of AdamW (betas 0.9 and 0.95, no weight decay).
        warmup_steps: Steps of linear warm-up; `None` means a fiftieth of all.
        schedule: What follows the warm-up: `"cosine"` falls to zero, `"wsd"` stays and falls linearly to zero in
            the last `decay_steps`, `"constant"` stays.
        decay_steps: `None` means a fifth of all; for `"wsd"` only.
        max_grad_norm: Each layer's gradients are clipped to this norm.
        sequences: Sequences per step, shared by the processes of a run; each update learns from all of them.
        queries_per_update: Queries that one optimizer step of a layer learns from, drawn without replacement
            from the sequence; `None` means 64, or all of a shorter sequence. Many small updates learn more from
            the same tokens than few large ones. A GPU is hardly busy with 64; there 512 with more updates pays.
        updates_per_sequence: Optimizer steps per layer and step; `None` means as many as use every query
            of a sequence about once.
        seed: Of the order of the windows and of the draws of queries.
        target: `"far"` learns only what has to be selected: sinks and local window are left out of both
            distributions. `"paper"` learns all causal positions (arXiv 2512.02556, eq. 3).
        boundaries: Tokens attend within their own document, and positions begin anew with each; otherwise a
            sequence is read as one text.
        start: `"random"` begins with the weights that the indexers have, `"fitted"` sets them first, in closed form,
            from the attention that the first sequence has in each layer (`dsa.train.start`).

    Raises:
        ValueError: A value is out of range.
    """

    steps: int
    seq_len: int
    lr: float = 1e-2
    warmup_steps: int | None = None
    schedule: Schedule = "cosine"
    decay_steps: int | None = None
    max_grad_norm: float = MAX_GRAD_NORM
    sequences: int = 1
    queries_per_update: int | None = None
    updates_per_sequence: int | None = None
    seed: int = 0
    target: Target = "far"
    boundaries: bool = True
    start: Start = "random"

    def __post_init__(self) -> None:
        require_int("steps", self.steps, 1)
        require_int("seq_len", self.seq_len, 2)
        require_int("seed", self.seed, 0)
        require_int("sequences", self.sequences, 1)
        require_positive("max_grad_norm", self.max_grad_norm)
        if self.start not in get_args(Start):
            raise ValueError(f"start must be one of {', '.join(get_args(Start))}, got {self.start!r}")
        for name in ("queries_per_update", "updates_per_sequence"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 1)
        check_schedule(self.schedule, self.lr, self.steps, self.warmup_steps, self.decay_steps)
        if self.target not in get_args(Target):
            raise ValueError(f"target must be one of {', '.join(get_args(Target))}, got {self.target!r}")

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
        warmup = default_warmup(self.steps) if self.warmup_steps is None else self.warmup_steps
        return dataclasses.replace(
            self,
            warmup_steps=warmup,
            decay_steps=self.decay_steps or default_decay(self.schedule, self.steps, warmup),
            queries_per_update=queries,
            updates_per_sequence=self.updates_per_sequence or max(1, round(fewest / queries)),
        )

    def first_query(self, config: DSAConfig, layer: int) -> int:
        """The first query of a sequence that has at least two tokens to compare in this layer."""
        sinks, local = self.always_read(config, layer)
        return sinks + local + 1

    def always_read(self, config: DSAConfig, layer: int) -> tuple[int, int]:
        """How many sinks and local tokens the loss leaves out in this layer."""
        return (config.sinks, config.layer_local(layer)) if self.target == "far" else (0, 0)

    def lr_at(self, step: float) -> float:
        """Learning rate at a step, fractions of a step included."""
        assert self.warmup_steps is not None, "resolved() comes first"
        return self.lr * factor_at(step, self.schedule, self.steps, self.warmup_steps, self.decay_steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


Precision = Literal["no", "bf16"]
LORA_LR = 1e-4
PARAMETERS_LR = 1e-5


@dataclass(frozen=True)
class SparseSettings:
    """How a model is trained to live with its selection, and its indexers with it.

    Exactly one of `lora`, `all_parameters` and `parameters` says what learns from the language-modelling loss.

    Args:
        steps: Optimizer steps.
        seq_len: Tokens per sequence.
        lora: Rank of low-rank adapters (PEFT) on every linear layer of the decoder.
        all_parameters: Train every parameter of the model.
        parameters: Train the parameters whose names this regular expression finds.
        lora_alpha: The adapters' output is scaled by this over the rank; `None` means twice the rank.
        lr: Peak learning rate of the model's AdamW; `None` means 1e-4 for adapters, 1e-5 for parameters.
        indexer_lr: Peak learning rate of the indexers.
        warmup_steps, schedule, decay_steps, max_grad_norm, target, boundaries, seed: As in `WarmupSettings`.
        sequences: Sequences per step, shared by the processes of a run, read one at a time.
        index_queries: Queries of each sequence that the indexers learn from, drawn at random; `None` means all.
        distill: Weight of the divergence from the dense model's predictions, added to the language-modelling loss.
        mixed_precision: `"bf16"` computes in bf16 with the parameters as they are.
        gradient_checkpointing: Keep no activations within layers and compute them again in the backward pass.

    Raises:
        ValueError: A value is out of range, or not exactly one of the three is given.
    """

    steps: int
    seq_len: int
    lora: int | None = None
    all_parameters: bool = False
    parameters: str | None = None
    lora_alpha: float | None = None
    lr: float | None = None
    indexer_lr: float = 1e-3
    warmup_steps: int | None = None
    schedule: Schedule = "cosine"
    decay_steps: int | None = None
    max_grad_norm: float = MAX_GRAD_NORM
    sequences: int = 1
    index_queries: int | None = None
    distill: float = 0.0
    mixed_precision: Precision = "no"
    gradient_checkpointing: bool = False
    seed: int = 0
    target: Target = "far"
    boundaries: bool = True

    def __post_init__(self) -> None:
        chosen = [self.lora is not None, self.all_parameters, self.parameters is not None]
        if sum(chosen) != 1:
            raise ValueError(
                "the sparse stage trains one of: --lora RANK, --all-parameters, --parameters PATTERN; "
                f"got {sum(chosen)} of them"
            )
        if self.lora is not None:
            require_int("lora", self.lora, 1)
        if self.lora_alpha is not None:
            require_positive("lora_alpha", self.lora_alpha)
            if self.lora is None:
                raise ValueError(f"lora_alpha={self.lora_alpha} has no meaning without lora")
        if self.index_queries is not None:
            require_int("index_queries", self.index_queries, 1)
        if isinstance(self.distill, bool) or not isinstance(self.distill, (int, float)) or not 0 <= self.distill < 1e6:
            raise ValueError(f"distill must be a number of at least 0, got {self.distill!r}")
        _check_precision(self.mixed_precision)
        self.indexer_settings()
        check_schedule(self.schedule, self.peak_lr, self.steps, self.warmup_steps, self.decay_steps)

    @property
    def peak_lr(self) -> float:
        """The model's peak learning rate."""
        if self.lr is not None:
            return self.lr
        return LORA_LR if self.lora is not None else PARAMETERS_LR

    def indexer_settings(self) -> WarmupSettings:
        """The part that concerns the indexers, with what follows from `None` filled in."""
        check_schedule(
            self.schedule, self.indexer_lr, self.steps, self.warmup_steps, self.decay_steps, name="indexer_lr"
        )
        given = WarmupSettings(
            steps=self.steps,
            seq_len=self.seq_len,
            lr=self.indexer_lr,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule,
            decay_steps=self.decay_steps,
            max_grad_norm=self.max_grad_norm,
            sequences=self.sequences,
            seed=self.seed,
            target=self.target,
            boundaries=self.boundaries,
        )
        warmup = default_warmup(self.steps) if self.warmup_steps is None else self.warmup_steps
        decay = self.decay_steps or default_decay(self.schedule, self.steps, warmup)
        return dataclasses.replace(given, warmup_steps=warmup, decay_steps=decay)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types of what decides the losses; recomputing activations does not."""
        plain = dataclasses.asdict(self)
        del plain["gradient_checkpointing"]
        return plain


@dataclass(frozen=True)
class DenseSettings:
    """How a model is trained with full attention, before it has indexers or beside what the sparse stage does.

    Args:
        steps: Optimizer steps.
        seq_len: Tokens per sequence.
        parameters: Train the parameters whose names this regular expression finds; `None` means all.
        lr: Peak learning rate of AdamW (betas 0.9 and 0.95, no weight decay).
        warmup_steps, schedule, decay_steps, max_grad_norm, boundaries, seed: As in `WarmupSettings`.
        sequences: Sequences per step, shared by the processes of a run, read one at a time.
        expert_bias_rate: How far a step moves the bias with which a router selects an expert, towards equal load; 0
            leaves it. For models with such biases (DeepSeek-V3).
        mixed_precision: `"bf16"` computes in bf16 with the parameters as they are.
        gradient_checkpointing: Keep no activations within layers and compute them again in the backward pass.

    Raises:
        ValueError: A value is out of range.
    """

    steps: int
    seq_len: int
    parameters: str | None = None
    lr: float = PARAMETERS_LR
    warmup_steps: int | None = None
    schedule: Schedule = "cosine"
    decay_steps: int | None = None
    max_grad_norm: float = MAX_GRAD_NORM
    sequences: int = 1
    expert_bias_rate: float = 0.0
    mixed_precision: Precision = "no"
    gradient_checkpointing: bool = False
    seed: int = 0
    boundaries: bool = True

    def __post_init__(self) -> None:
        require_int("steps", self.steps, 1)
        require_int("seq_len", self.seq_len, 2)
        require_int("sequences", self.sequences, 1)
        require_int("seed", self.seed, 0)
        require_positive("max_grad_norm", self.max_grad_norm)
        rate = self.expert_bias_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(f"expert_bias_rate must be a number from 0 to below 1, got {rate!r}; 0.001 is usual")
        _check_precision(self.mixed_precision)
        check_schedule(self.schedule, self.lr, self.steps, self.warmup_steps, self.decay_steps)

    @property
    def peak_lr(self) -> float:
        """The model's peak learning rate."""
        return self.lr

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types of what decides the losses; recomputing activations does not."""
        plain = dataclasses.asdict(self)
        del plain["gradient_checkpointing"]
        return plain


def _check_precision(given: object) -> None:
    if given not in get_args(Precision):
        raise ValueError(f"mixed_precision must be one of {', '.join(get_args(Precision))}, got {given!r}")
