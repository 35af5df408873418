"""What a warm-up run is told to do, validated, and the learning rate that follows from it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dsa.config import DSAConfig

Target = Literal["far", "paper"]

BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
QUERIES_PER_UPDATE = 64


@dataclass(frozen=True)
class WarmupSettings:
    """How the indexers are trained. The same settings, model and data give the same losses.

    Args:
        steps: Sequences that the frozen model reads. Every sequence trains all layers.
        seq_len: Tokens per sequence.
        lr: Peak learning rate of AdamW (betas 0.9 and 0.95, no weight decay, gradients clipped to norm 1).
        warmup_steps: Steps of linear warm-up before the cosine decay to zero; `None` means a fiftieth of all.
        queries_per_update: Queries that one optimizer step of a layer learns from, drawn without replacement
            from the sequence; `None` means 64, or all of a shorter sequence. Many small updates learn more from
            the same tokens than few large ones. A GPU is hardly busy with 64; there 512 with more updates pays.
        updates_per_sequence: Optimizer steps per layer and sequence; `None` means as many as use every query
            of the sequence about once.
        seed: Of the order of the windows and of the draws of queries.
        target: `"far"` learns only what has to be selected: sinks and local window are left out of both
            distributions. `"paper"` learns all causal positions (arXiv 2512.02556, eq. 3).

    Raises:
        ValueError: A value is out of range.
    """

    steps: int
    seq_len: int
    lr: float = 1e-2
    warmup_steps: int | None = None
    queries_per_update: int | None = None
    updates_per_sequence: int | None = None
    seed: int = 0
    target: Target = "far"

    def __post_init__(self) -> None:
        _require_int("steps", self.steps, 1)
        _require_int("seq_len", self.seq_len, 2)
        _require_int("seed", self.seed, 0)
        for name in ("queries_per_update", "updates_per_sequence"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), 1)
        if isinstance(self.lr, bool) or not isinstance(self.lr, (int, float)) or not 0 < self.lr < 1:
            raise ValueError(f"lr must lie between 0 and 1, got {self.lr!r}; 0.01 is a good start")
        if self.warmup_steps is not None:
            _require_int("warmup_steps", self.warmup_steps, 0)
            if self.warmup_steps >= self.steps:
                raise ValueError(
                    f"warmup_steps must be less than steps ({self.steps}), got {self.warmup_steps}: the learning "
                    "rate would never reach its peak"
                )
        if self.target not in get_args(Target):
            raise ValueError(f"target must be one of {', '.join(get_args(Target))}, got {self.target!r}")

    def resolved(self, config: DSAConfig, layers: list[int]) -> WarmupSettings:
        """These settings with every `None` replaced, for a model whose indexers are in `layers`.

        Raises:
            ValueError: The sequences are so short that a layer would have nothing to learn from, or an update
                asks for more queries than a sequence has.
        """
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
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(math.ceil(self.steps / 50), self.steps - 1)
        return dataclasses.replace(
            self,
            warmup_steps=warmup,
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
        """Learning rate at a step, fractions of a step included: linear warm-up, then a cosine to zero."""
        assert self.warmup_steps is not None, "resolved() comes first"
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def _require_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
