"""The ratio of two perplexities on the same tokens, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsa.eval.interval import NORMAL_95

BLOCK = 64
"""Neighbouring tokens whose losses are taken as one observation: what goes wrong goes wrong in a row."""


@dataclass(frozen=True)
class PerplexityRatio:
    """Perplexity of a model over that of another on the same tokens.

    Args:
        ratio: `exp` of the mean difference of their losses.
        low: Lower end of the 95 % interval; equal to `ratio` where there are too few tokens for one.
        high: Upper end.
        tokens: How many losses were compared.
    """

    ratio: float
    low: float
    high: float
    tokens: int

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.ratio:.4f}"
        return f"{self.ratio:.4f} (95 % interval {self.low:.4f} to {self.high:.4f})"


def perplexity_ratio(losses: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> PerplexityRatio:
    """Compares losses token by token.

    The interval is that of the mean over blocks of 64 neighbouring tokens. It speaks of other tokens of texts like
    these, not of other texts.

    Args:
        losses: Negative log-likelihoods `[n]` of one text each.
        dense: Those of the model it is compared with, of the same tokens.
    """
    differences = [(ours - theirs).double() for ours, theirs in zip(losses, dense, strict=True)]
    together = torch.cat(differences)
    mean = float(together.mean())
    blocks = [each[: len(each) // BLOCK * BLOCK].view(-1, BLOCK).mean(dim=1) for each in differences]
    observed = torch.cat(blocks)
    half = NORMAL_95 * float(observed.std()) / math.sqrt(len(observed)) if len(observed) > 1 else 0.0
    return PerplexityRatio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(together))
