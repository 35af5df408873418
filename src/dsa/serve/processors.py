"""What is done to the scores of the next token, as transformers' `LogitsProcessor`s."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor


class CountPenalty(LogitsProcessor):
    """OpenAI's penalties: `scores - presence * (count > 0) - frequency * count`, counted in the answer only."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        """
        Args:
            prompt: Tokens before the answer.
            presence: See above.
            frequency: See above.
        """
        self._prompt, self._presence, self._frequency = prompt, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written, counts = input_ids[0, self._prompt :].unique(return_counts=True)
        scores[0, written] -= self._presence + self._frequency * counts.to(scores.dtype)
        return scores


class Likelihoods(LogitsProcessor):
    """Remembers how likely each token was in the latest step, and changes nothing.

    Attributes:
        logprobs: fp32 `[V]`.
    """

    def __init__(self) -> None:
        self.logprobs = torch.zeros(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logprobs = scores[0].float().log_softmax(dim=-1)
        return scores
