"""How the next token is chosen: as transformers' `generate` does it, with the model's own generation settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sampling:
    """What a user may say about the choice of tokens.

    Args:
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: Sample from the likeliest tokens of this mass.
        seed: Makes sampling repeatable; `None` takes torch's own random numbers.
        processors: transformers' `LogitsProcessor`s, called before temperature and `top_p`, after the model's own.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    processors: Sequence[Any] = ()


GREEDY = Sampling()


class Chooser:
    """Chooses the tokens of one answer.

    What the model's `generation_config` also says (penalties, tokens that are never written, which tokens end a
    text) holds as it does in `generate`: transformers makes the processors of the logits.
    """

    def __init__(self, model: Any, sampling: Sampling, prompt: Sequence[int], max_new_tokens: int) -> None:
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        config, _ = model._prepare_generation_config(None, max_new_tokens=max_new_tokens, **options)
        model._prepare_special_tokens(config, True, device=model.device)
        self._processors = model._get_logits_processor(
            config,
            input_ids_seq_length=len(prompt),
            logits_processor=list(sampling.processors),
            device=model.device,
            model_kwargs={},
        )
        self._samples = sampling.temperature > 0
        self._generator = None
        if sampling.seed is not None:
            self._generator = torch.Generator(model.device).manual_seed(sampling.seed)
        self._ids = torch.tensor([list(prompt) if self._processors else []], device=model.device)
        ends = config.eos_token_id
        self.ends = set() if ends is None else set(ends if isinstance(ends, list) else [ends])

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token, given its logits, fp32 `[V]`.

        Raises:
            ValueError: They are not finite.
        """
        check_finite(logits)
        scores = self._processors(self._ids, logits[None].clone())
        if self._samples:
            token = torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=self._generator)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        if self._processors:
            self._ids = torch.cat([self._ids, token], dim=-1)
        return int(token)


def check_finite(logits: torch.Tensor) -> None:
    """Refuses logits that are NaN or overflow; some models give `-inf` to tokens that they never write."""
    if not bool(torch.isfinite(logits.max())):
        raise ValueError(
            "the model's output for this text is not finite: its weights or activations are NaN or overflow; try fp32, "
            "and check the checkpoint"
        )
