"""What a calibration is told to do, validated, and the budgets it tries when none are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dsa.config import DSAConfig

Minimise = Literal["operations", "bytes", "tokens"]

MAX_BUDGETS = 16
QUARTERS = (4, 5, 6, 7)


@dataclass(frozen=True)
class CalibrationSettings:
    """What to reach and what may be done for it. One of `mass` and `perplexity_ratio` is given.

    Args:
        mass: Target: the share of its attention that every sparse layer keeps, e.g. 0.98.
        perplexity_ratio: Target: perplexity over that of the dense model, e.g. 1.005.
        tokens: Positions of each text, the second half counts; by default 8192, or all of a shorter one.
        budgets: Values of `K` to choose from; `None` takes four per doubling, from just above what is always read
            to a quarter of the shortest text.
        max_dense: Layers that may keep full attention, those without an indexer included.
        may_share: Whether layers may read an earlier layer's selection.
        min_shared: Share of the layers that must do so, e.g. 0.34.
        effects: Whether each layer's effect on the predictions is measured. `False` trusts the attention mass
            alone to tell which layers need more: faster, and less sparing.
        minimise: What to keep low: `"operations"` of attention and indexers, `"bytes"` that decoding reads, or
            `"tokens"` read. Sharing saves no tokens, so with the last only `min_shared` layers share.
        compare_uniform: Find the one K for all layers that is as good, too.

    Raises:
        ValueError: A value is out of range, or not exactly one target is given.
    """

    mass: float | None = None
    perplexity_ratio: float | None = None
    tokens: int | None = None
    budgets: tuple[int, ...] | None = None
    max_dense: int = 3
    may_share: bool = True
    min_shared: float = 0.0
    effects: bool = True
    minimise: Minimise = "operations"
    compare_uniform: bool = False

    def __post_init__(self) -> None:
        if (self.mass is None) == (self.perplexity_ratio is None):
            given = "neither" if self.mass is None else "both"
            raise ValueError(
                f"give either mass (0.98, say) or perplexity-ratio (1.005, say) as the target, got {given}"
            )
        if self.mass is not None and not 0 < self.mass < 1:
            raise ValueError(
                f"mass is the share of its attention that each layer must keep: it must lie between 0 and 1, got "
                f"{self.mass}"
            )
        ratio = self.perplexity_ratio
        if ratio is not None and not 1 < ratio < math.inf:
            raise ValueError(
                f"perplexity-ratio is over the dense model's and must be above 1, got {ratio}; 1.005 allows half a "
                "percent"
            )
        if self.max_dense < 0:
            raise ValueError(f"max-dense must be at least 0, got {self.max_dense}")
        if not 0 <= self.min_shared < 1:
            raise ValueError(f"min-shared is a share of the layers: at least 0 and below 1, got {self.min_shared}")
        if self.min_shared and not self.may_share:
            raise ValueError(f"min-shared={self.min_shared} contradicts no-share; leave one of them out")
        if self.minimise not in get_args(Minimise):
            raise ValueError(f"minimise must be one of {', '.join(get_args(Minimise))}, got {self.minimise!r}")
        for budget in self.budgets or ():
            if budget < 1:
                raise ValueError(f"top-k must be at least 1, got {budget}")


def resolve_budgets(
    settings: CalibrationSettings, config: DSAConfig, layers: Sequence[int], shortest: int
) -> list[int]:
    """The budgets to choose from, ascending.

    Args:
        settings: What was asked for.
        config: What the model is attached with.
        layers: Layers with an indexer.
        shortest: Tokens of the shortest text.

    Raises:
        ValueError: A budget below what is always read or not below the text's length, or a text too short to try any.
    """
    always = config.sinks + max(config.layer_local(layer) for layer in layers)
    if settings.budgets is not None:
        budgets = sorted(set(settings.budgets))
        if budgets[0] < always:
            raise ValueError(
                f"top-k: {budgets[0]} is below the {config.sinks} sinks and {always - config.sinks} local tokens that "
                f"these indexers always read; try {always} or more"
            )
        if budgets[-1] >= shortest:
            raise ValueError(
                f"top-k: {budgets[-1]:,} is not below the text's {shortest:,} tokens, so nothing would be left out; "
                "give a longer text, more --tokens, or a smaller top-k"
            )
        return budgets
    largest = shortest // 4 if shortest // 4 > 2 * always else shortest // 2
    ladder = [quarter << power >> 2 for power in range(40) for quarter in QUARTERS]
    budgets = sorted({budget for budget in ladder if max(1.1 * always, largest / 32) <= budget <= largest})
    if not budgets:
        raise ValueError(
            f"data: {shortest:,} tokens are too few to calibrate on: {always} of them are always read; "
            f"at least {4 * always:,} are needed, and 8,192 are a good length"
        )
    return budgets[-MAX_BUDGETS:]
