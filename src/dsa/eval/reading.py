"""One model reads a text once: perplexity, prefill time, decode speed, peak memory and a continuation.

The prefill asks the model for its last logits only, as a user's prompt would. The perplexity comes from the hidden
states of that same pass: the language-modelling head then runs over them a chunk at a time, outside the timing, so
that `[n, vocabulary]` never exists.

Shapes: `B = 1` text, `n` tokens read, `C` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dsa.models.context import DSAContext
from dsa.models.decoder import LOGITS_AT_ONCE, decoder_output, head_logits, layer_progress
from dsa.models.rope import angles_for, length_read
from dsa.runs.machine import peak_rss_mb, reset_peak_rss
from dsa.runs.progress import Progress, silent

WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class Reading:
    """What reading one text came to.

    Args:
        perplexity: `exp` of the mean negative log-likelihood, in nats, of the evaluated tokens.
        evaluated: How many tokens that mean is over.
        prefill_s: Seconds for the whole prompt, last logits included.
        decode_tokens_per_s: Greedy tokens per second after the prompt, `None` where fewer than two were made.
        peak_rss_mb: Peak resident memory of the process while reading, MB; `None` where the system cannot
            start a new peak.
        continuation: Greedily decoded token ids.
    """

    perplexity: float
    evaluated: int
    prefill_s: float
    decode_tokens_per_s: float | None
    peak_rss_mb: float | None
    continuation: list[int]


@torch.no_grad()
def read(
    model: Any,
    ids: torch.Tensor,
    *,
    start: int,
    new_tokens: int = 0,
    context: Callable[[], DSAContext] | None = None,
    label: str = "reading",
    progress: Progress = silent,
) -> Reading:
    """Reads `ids`, then continues them greedily.

    Args:
        model: A causal language model as it is: plain, attached, accelerated, or inside `window_attention`.
        ids: int64 `[1, n]`.
        start: First position whose prediction of the next token counts towards the perplexity: logits of the
            positions `start` to `n - 2`, against the tokens `start + 1` to `n - 1`.
        new_tokens: Tokens to decode after the prompt; end-of-text does not stop it.
        context: Makes the context of every pass, for models that take one.
        label: Names the steps in `progress`.
        progress: Shows the steps.

    Raises:
        ValueError: `start` leaves nothing to evaluate, or the model's output is not finite.
    """
    tokens = ids.shape[1]
    if not 0 <= start < tokens - 1:
        raise ValueError(f"start must lie in 0 to {tokens - 2} for {tokens} tokens, got {start}")
    ids = ids.to(model.device)

    def options() -> dict[str, Any]:
        return {"use_cache": True, "logits_to_keep": 1, **({} if context is None else {"dsa_context": context()})}

    with angles_for(model, length_read(model.config, tokens, new_tokens)):
        model(ids[:, :WARM_UP_TOKENS], **options())
        can_reset = reset_peak_rss()
        with layer_progress(model, f"{label}: prefill", progress), decoder_output(model) as captured:
            _synchronise(model)
            began = time.perf_counter()
            output = model(ids, **options())
            _synchronise(model)
            prefill_s = time.perf_counter() - began
        losses = token_losses(model, captured[0], ids, start, label=f"{label}: perplexity", progress=progress)
        captured.clear()
        continuation, per_second = _decode(model, output, new_tokens, options, f"{label}: decode", progress)
    peak = peak_rss_mb() if can_reset else None
    return Reading(math.exp(float(losses.mean())), tokens - 1 - start, prefill_s, per_second, peak, continuation)


@torch.no_grad()
def token_losses(
    model: Any,
    output: Any,
    ids: torch.Tensor,
    start: int,
    *,
    label: str = "perplexity",
    progress: Progress = silent,
) -> torch.Tensor:
    """What each token after position `start` cost the model, out of its decoder's output for all of `ids`.

    Args:
        model: The causal language model.
        output: What its decoder returned (`decoder_output`).
        ids: int64 `[1, n]`, on the model's device.
        start: First position whose prediction of the next token counts.
        label: Names the step in `progress`.
        progress: Shows the step.

    Returns:
        Negative log-likelihoods in nats, fp64 `[n - 1 - start]` on the CPU.

    Raises:
        ValueError: The model's output is not finite.
    """
    hidden, targets = output.last_hidden_state, ids[:, 1:]
    last = ids.shape[1] - 1
    rows = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    chunks = range(start, last, rows)
    parts = []
    with progress(label, len(chunks)) as advance:
        for begin in chunks:
            end = min(begin + rows, last)
            logits = head_logits(model, output, hidden[:, begin:end], ids[:, begin:end])
            losses = negative_log_likelihood(logits[0].float(), targets[0, begin:end])
            if not bool(torch.isfinite(losses).all()):
                raise ValueError(
                    f"the model's output for this text is not finite (seen among positions {begin} to {end - 1}): its "
                    "weights or activations are NaN or overflow; try fp32, and check the checkpoint"
                )
            parts.append(losses.cpu())
            advance()
    return torch.cat(parts)


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`-log softmax(logits)[target]` in nats, fp64 `[rows]`, of fp32 logits `[rows, V]`.

    Not `cross_entropy`: over a vocabulary of 49,152 its fp32 sum on the CPU came out 1e-5 too low on average,
    `logsumexp` within 1e-8.
    """
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    return logits.logsumexp(dim=1).double() - chosen.double()


def _decode(
    model: Any, output: Any, new_tokens: int, options: Callable[[], dict[str, Any]], label: str, progress: Progress
) -> tuple[list[int], float | None]:
    """Greedy continuation, and tokens per second of the steps after the first token (which the prefill made)."""
    if new_tokens < 1:
        return [], None
    token = output.logits[:, -1:].argmax(dim=-1)
    made, cache = [token], output.past_key_values
    with progress(label, new_tokens - 1) as advance:
        _synchronise(model)
        began = time.perf_counter()
        for _ in range(new_tokens - 1):
            step = model(token, past_key_values=cache, **options())
            token = step.logits[:, -1:].argmax(dim=-1)
            made.append(token)
            advance()
        _synchronise(model)
        seconds = time.perf_counter() - began
    per_second = (new_tokens - 1) / seconds if new_tokens > 1 else None
    return torch.cat(made, dim=1)[0].tolist(), per_second


def _synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
