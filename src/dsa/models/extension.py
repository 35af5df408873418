"""A document longer than the model's positions: the RoPE scaling that makes room for it, when a user names none."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsa.models.rope import OFF, RopeScaling, describe, extend_positions, parse_scaling, scaling_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STEPS = 4
"""Factors are multiples of a quarter: texts of nearly the same length are read with the same angles."""


@dataclass(frozen=True)
class Demand:
    """Tokens that one run puts into the context.

    Args:
        document: Of the document, as much of it as is read.
        around: Of the question and of the chat template.
        new: Written at most.
    """

    document: int
    around: int
    new: int

    @property
    def prompt(self) -> int:
        """What is read."""
        return self.document + self.around

    @property
    def total(self) -> int:
        """Positions in all."""
        return self.prompt + self.new

    def fitting(self, total: int) -> int:
        """How many tokens of the document fit into `total` positions; 0 where none do."""
        return max(0, total - self.around - self.new)


def fitting_tokens(needed: Demand, positions: int) -> str:
    """What of a text a model reads well, in words."""
    fitting = needed.fitting(positions)
    return f"its first {fitting:,} tokens fit (--tokens {fitting})" if fitting > 1 else "take another model"


def chosen_scaling(
    name: str,
    asked: str | None,
    indexers: str | Path | None,
    demand: Callable[[Any], Demand],
    fits: Callable[[Demand, int], str] = fitting_tokens,
) -> Callable[[PreTrainedConfig, Any], RopeScaling | None]:
    """What `load_model(rope_scaling=...)` takes to have as many positions as a run needs.

    A scaling that the user asks for is taken, else the one that the indexers named were trained with; without either
    the smallest YaRN factor with room enough, where the model has plain RoPE. What then falls short or is stretched is
    warned of.

    Args:
        name: What to call the model in messages.
        asked: `"off"` for the model's own positions, or as `dsa.models.rope.parse_scaling` takes it.
        indexers: As in `dsa.attach`.
        demand: Given the tokenizer, how much the run needs.
        fits: Says what of the text fits into so many positions, for the warning of one that does not.

    Raises:
        ValueError: The text is no scaling, or the indexers cannot be read. What is returned raises it where `"off"`
            leaves too few positions.
        OSError: There are no such indexers.
    """
    wanted = scaling_wanted(asked, indexers)

    def choose(config: PreTrainedConfig, tokenizer: Any) -> RopeScaling | None:
        needed = demand(tokenizer)
        positions = positions_of(config)
        if positions is None:
            return wanted
        if asked == OFF and needed.total > positions:
            raise ValueError(_too_long(name, needed, positions))
        if asked == OFF or wanted is not None:
            extended = positions if wanted is None else _positions_with(config, wanted)
            if needed.total > extended:
                _warn_extrapolated(name, needed, extended, describe(wanted), fits)
            return wanted
        if needed.total <= positions:
            return None
        scaling = smallest_scaling(needed.total, positions)
        try:
            extend_positions(copy.deepcopy(config), scaling)
        except ValueError:
            _warn_extrapolated(name, needed, positions, describe(scaling_of(config)), fits)
            return None
        warnings.warn(
            f"this text is {needed.total / positions:.1f} times longer than {name} reads well; it will find and "
            f"understand less than in a shorter one: {fits(needed, positions)}",
            UserWarning,
            stacklevel=2,
        )
        return scaling

    return choose


def scaling_wanted(text: str | None, indexers: str | Path | None) -> RopeScaling | None:
    """The RoPE scaling that a user asks for, or else the one that the indexers named were trained with.

    Args:
        text: As `dsa.models.rope.parse_scaling` takes it; `"off"` for none at all.
        indexers: As in `dsa.attach`.

    Raises:
        ValueError: The text is no scaling, or the indexers cannot be read.
        OSError: There are no such indexers.
    """
    from dsa.models.checkpoint import read_indexers

    if text == OFF:
        return None
    if text is not None:
        return parse_scaling(text)
    return None if indexers is None else read_indexers(indexers).base_model.get("rope_scaling")


def smallest_scaling(needed: int, positions: int) -> RopeScaling:
    """YaRN (arXiv 2309.00071) by the smallest multiple of a quarter that makes `needed` positions out of fewer."""
    assert needed > positions
    return {"rope_type": "yarn", "factor": math.ceil(STEPS * needed / positions) / STEPS}


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many positions a model was made for; `None` where its configuration does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def _positions_with(config: PreTrainedConfig, scaling: RopeScaling) -> int:
    """Positions under a scaling. Raises `ValueError` as `extend_positions` does."""
    scaled = copy.deepcopy(config)
    extend_positions(scaled, scaling)
    positions = positions_of(scaled)
    assert positions is not None
    return positions


def _warn_extrapolated(
    name: str, needed: Demand, positions: int, rope: str, fits: Callable[[Demand, int], str]
) -> None:
    warnings.warn(
        f"this text with its answer takes {needed.total:,} positions, but {name} has {positions:,} positions with "
        f"{rope}: those from {positions:,} on are extrapolated, and quality may fall; {fits(needed, positions)}",
        UserWarning,
        stacklevel=3,
    )


def _too_long(name: str, needed: Demand, positions: int) -> str:
    fitting = needed.fitting(positions)
    advice = (
        f"{fitting:,} tokens of it fit: give --tokens {fitting} or fewer --pages, or leave --rope-scaling out to "
        "stretch the positions"
        if fitting > 1
        else "the question or --max-new-tokens alone fill them"
    )
    return (
        f"rope-scaling is off and {name} has {positions:,} positions, but the text with its question has "
        f"{needed.prompt:,} tokens and up to {needed.new:,} follow; {advice}"
    )
