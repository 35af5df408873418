"""What runs inside a causal language model: its decoder, the decoder's layers, and its language-modelling head.

Works on any model, whether or not a family of the table. Shapes: `C` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dsa.runs.progress import Progress

if TYPE_CHECKING:
    # Only for types: `AutoConfig` comes here for a configuration class (see `dsa._auto_classes`).
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 1 << 24
"""Logits computed at once, `rows * V`: 64 MB in fp32."""


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder without its language-modelling head."""
    inner = model.base_model
    # Llama 4's text model has another name than its class says, and transformers finds none.
    return cast("PreTrainedModel", getattr(model, "model", inner) if inner is model else inner)


def decoder_layers(model: Any) -> list[Any]:
    """The decoder's layers, in order; empty where the model keeps them in no list of that length."""
    count = model.config.get_text_config().num_hidden_layers
    for child in decoder_of(model).modules():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return list(child)
    return []


@contextmanager
def layer_progress(model: Any, label: str, progress: Progress, passes: int = 1) -> Iterator[None]:
    """Shows forward passes layer by layer."""
    layers = decoder_layers(model)
    with progress(label, len(layers) * passes) as advance:
        hooks = [layer.register_forward_hook(lambda *_: advance()) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def decoder_output(model: Any) -> Iterator[list[Any]]:
    """Keeps what the decoder returns while the context is open."""
    captured: list[Any] = []
    hook = decoder_of(model).register_forward_hook(lambda module, args, output: captured.append(output))
    try:
        yield captured
    finally:
        hook.remove()


def head_logits(model: Any, output: Any, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[1, rows, V]` of some hidden states `[1, rows, C]`, as the model itself makes them.

    What a model does around its head (soft-capping, scaling) differs by family, so the model's own forward
    runs, with a decoder that returns these hidden states at once.

    Args:
        model: The causal language model.
        output: What its decoder returned in an earlier pass; anything but the hidden states is passed on.
        hidden: The hidden states.
        ids: The tokens at those places.
    """
    answer = copy.copy(output)
    answer.last_hidden_state = hidden
    answer.past_key_values = None
    decoder = decoder_of(model)
    replaced = "forward" in vars(decoder)
    original = decoder.forward
    decoder.forward = lambda *args, **kwargs: answer
    try:
        return model(ids, use_cache=False).logits
    finally:
        if replaced:
            decoder.forward = original
        else:
            del decoder.forward
