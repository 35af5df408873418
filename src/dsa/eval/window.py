"""The baseline "4 sinks + sliding window": what each query reads when recency decides instead of an indexer.

It runs on the plain model with an attention function of its own that visits only the blocks it needs, so that it
costs what such a window costs; the same positions given to `DSAContext.select` lead to the same result.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values,
`K` tokens read per query.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATION = "dsa_window_baseline"
SINKS = 4
QUERIES_AT_A_TIME = 128


def sinks_and_recent(top_k: int) -> tuple[int, int]:
    """How a budget of `top_k` tokens is split into first and most recent tokens."""
    sinks = min(SINKS, top_k - 1)
    return sinks, top_k - sinks


@contextmanager
def window_attention(model: Any, budgets: Mapping[int, int]) -> Iterator[None]:
    """Lets some layers of a plain model read only sinks and a window while the context is open.

    Args:
        model: A model that is not attached, called with one unpadded text at a time.
        budgets: Tokens read per query, by layer. Other layers keep the model's own attention.
    """
    own = model.config._attn_implementation

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        budget = budgets.get(int(module.layer_idx))
        if budget is None:
            options = {"softcap": softcap, "s_aux": s_aux}
            kept = {name: option for name, option in options.items() if option is not None}
            function = _own_attention(module, own)
            return function(module, query, key, value, attention_mask, scaling=scaling, **kept, **kwargs)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend_to_window(query, key, value, budget, scale, softcap, s_aux).transpose(1, 2), None

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS[own])
    model.set_attn_implementation(IMPLEMENTATION)
    assert model.config._attn_implementation == IMPLEMENTATION
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _own_attention(module: Any, implementation: str) -> Any:
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def attend_to_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    top_k: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention to the first tokens and the most recent ones, `top_k` in all.

    Args:
        query: `[B, H, T, D]`, the last `T` of the `S` positions.
        key: `[B, G, S, D]`.
        value: `[B, G, S, Dv]`.
        top_k: Tokens read per query.
        scale: Factor on `query . key`.
        softcap: `softcap * tanh(scores / softcap)`.
        sink_logits: `[H]`, one logit per head in the softmax's denominator.

    Returns:
        `[B, H, T, Dv]`.
    """
    tokens, keys = query.shape[2], key.shape[2]
    sinks, recent = sinks_and_recent(top_k)
    blocks = []
    for begin in range(0, tokens, QUERIES_AT_A_TIME):
        end = min(begin + QUERIES_AT_A_TIME, tokens)
        last = torch.arange(begin, end, device=query.device) + keys - tokens
        first_read = max(sinks, int(last[0]) + 1 - recent)
        stop = int(last[-1]) + 1
        positions = torch.cat((torch.arange(min(sinks, stop)), torch.arange(first_read, max(first_read, stop)))).to(
            query.device
        )
        visible = (positions <= last[:, None]) & ((positions < sinks) | (positions > last[:, None] - recent))
        chosen_keys, chosen_values = (
            torch.cat((each[:, :, : min(sinks, stop)], each[:, :, first_read:stop]), dim=2) for each in (key, value)
        )
        blocks.append(_attend(query[:, :, begin:end], chosen_keys, chosen_values, visible, scale, softcap, sink_logits))
    return torch.cat(blocks, dim=2)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention of a block under `visible` bool `[T, S]`, query heads grouped by their KV head."""
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(batch, groups, heads // groups * tokens, width)
    scores = (grouped @ key.transpose(2, 3)).float().view(batch, heads, tokens, -1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill_(~visible, float("-inf"))
    if sink_logits is not None:
        column = sink_logits.float().view(1, heads, 1, 1).expand(batch, heads, tokens, 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype)
    out = weights.reshape(batch, groups, heads // groups * tokens, -1) @ value
    return out.view(batch, heads, tokens, -1)
