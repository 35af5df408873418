"""Language-modelling loss of a model, a chunk of positions at a time.

The logits of a long sequence are larger than everything else in the pass (8,192 tokens and a vocabulary of 128,256:
4.2 GB in fp32), so they exist for one chunk only and are made again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dsa.models.context import DSAContext
from dsa.models.decoder import LOGITS_AT_ONCE, decoder_of, head_logits
from dsa.train.data import Window

Losses = tuple[torch.Tensor, torch.Tensor]
"""Sums over positions: negative log-likelihood, and KL divergence from a teacher's predictions."""

Teacher = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Given hidden states `[1, rows, C]` of the teacher and the tokens there: its logits `[rows, V]`."""


def read_window(model: PreTrainedModel, window: Window, context: DSAContext | None) -> Any:
    """What the decoder makes of a window on its own device; logits are not computed.

    Args:
        model: An attached model, or with no context one that is not.
        window: What to read.
        context: Of this forward.
    """
    positions = None if window.positions is None else window.positions.to(model.device)
    attached = {} if context is None else {"dsa_context": context}
    # transformers finds packed documents by their positions.
    return decoder_of(model)(input_ids=window.ids.to(model.device), position_ids=positions, use_cache=False, **attached)


def predicted(window: Window, start: int = 0) -> torch.Tensor:
    """Which positions from `start` on predict a token of their own document, bool `[B, L - 1]`."""
    counts = torch.ones(window.ids.shape[0], window.ids.shape[1] - 1, dtype=torch.bool)
    if window.positions is not None:
        counts &= window.positions[:, 1:] > 0
    counts[:, :start] = False
    return counts


def language_losses(
    model: PreTrainedModel,
    output: Any,
    window: Window,
    *,
    start: int = 0,
    teacher_hidden: torch.Tensor | None = None,
    teacher: Teacher | None = None,
) -> Losses:
    """Losses of the predictions of the next tokens, summed over positions.

    Args:
        model: The causal language model.
        output: What `read_window` returned.
        window: What was read.
        start: First position whose prediction counts.
        teacher_hidden: Hidden states `[B, L, C]` of the dense model for the same window.
        teacher: Makes logits of them.

    Returns:
        fp32 scalars; the second is zero without a teacher.
    """
    hidden = output.last_hidden_state
    counts = predicted(window, start).to(hidden.device)
    ids = window.ids.to(hidden.device)
    rows = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)

    def chunk(part: torch.Tensor, theirs: torch.Tensor | None, read: torch.Tensor, targets: torch.Tensor) -> Losses:
        logits = head_logits(model, output, part, read)[0].float()
        likelihood = -(logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)).sum()
        if theirs is None:
            return likelihood, torch.zeros_like(likelihood)
        assert teacher is not None
        with torch.no_grad():
            wanted = teacher(theirs, read).float().log_softmax(dim=1)
        return likelihood, F.kl_div(logits.log_softmax(dim=1), wanted, reduction="sum", log_target=True)

    totals = torch.zeros(2, device=hidden.device)
    for sequence in range(len(ids)):
        places = counts[sequence].nonzero().flatten()
        for some in places.split(rows):
            parts = (
                hidden[sequence, some][None],
                None if teacher_hidden is None else teacher_hidden[sequence, some][None],
                ids[sequence, some][None],
                ids[sequence, some + 1],
            )
            losses = checkpoint(chunk, *parts, use_reentrant=False) if torch.is_grad_enabled() else chunk(*parts)
            totals = totals + torch.stack(losses)
    return totals[0], totals[1]
