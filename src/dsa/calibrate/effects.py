"""How much the model's predictions change when one layer alone reads sparsely.

The change is the KL divergence from the dense model's next-token distribution, `KL(dense || sparse)`, over sampled
positions. In expectation over what the model itself would write it is the rise of the loss, and, unlike the difference
of two losses on given text, it has hardly any noise: one layer's effect is far below what a few thousand tokens can
show of the latter.

A layer's effect needs the layers after it only: what the layers before it computed is kept from the dense pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from dsa.models.decoder import LOGITS_AT_ONCE, decoder_layers, head_logits

POSITIONS = 1024
"""At how many positions distributions are compared."""


@contextmanager
def recording(model: Any, outputs: list[Any]) -> Iterator[None]:
    """Appends what each layer of the decoder returns to `outputs` while the context is open."""
    hooks = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in decoder_layers(model)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def resumed(model: Any, outputs: list[Any], layer: int) -> Iterator[None]:
    """Makes a forward begin at `layer`: the layers in front answer with what was recorded, without computing.

    Args:
        model: The model.
        outputs: What `recording` saw of the same text, of the layers in front at least.
        layer: The first layer that computes.
    """
    with ExitStack() as stack:
        if outputs and layer > 0:
            for module in decoder_layers(model)[:layer]:
                stack.enter_context(_answering(module, outputs[layer - 1]))
        yield


@contextmanager
def _answering(module: nn.Module, answer: Any) -> Iterator[None]:
    replaced = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        if replaced is None:
            del module.forward
        else:
            module.forward = replaced


def compared_positions(start: int, tokens: int) -> torch.Tensor:
    """Evenly spaced positions from `start` to the last but one; int64."""
    count = max(1, min(POSITIONS, tokens - 1 - start))
    return torch.linspace(start, max(start, tokens - 2), count, dtype=torch.float64).round().long()


@torch.no_grad()
def divergence(model: Any, dense: Any, sparse: Any, ids: torch.Tensor, positions: torch.Tensor) -> float:
    """Mean `KL(dense || sparse)` in nats, at least 0, of the next token's distribution at some positions.

    Args:
        model: The causal language model.
        dense: What its decoder returned in the dense pass.
        sparse: What it returned in the other.
        ids: The text, int64 `[1, n]`.
        positions: Where to compare.
    """
    rows = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    total = 0.0
    for some in positions.to(ids.device).split(rows):
        expected, found = (
            head_logits(model, output, output.last_hidden_state[:, some], ids[:, some])[0].float().log_softmax(dim=-1)
            for output in (dense, sparse)
        )
        total += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
    return max(0.0, total / len(positions))
