"""How a measurement says how far it is, without knowing who draws the bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import nn


class Progress(Protocol):
    """Begins a step of `total` parts; the context's value is called once per finished part."""

    def __call__(self, label: str, total: int) -> AbstractContextManager[Callable[[], None]]: ...


@contextmanager
def silent(label: str, total: int) -> Iterator[Callable[[], None]]:
    """The `Progress` that shows nothing."""
    yield lambda: None


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder's layers, in order; empty where the model keeps them in no list of that length."""
    count = model.config.get_text_config().num_hidden_layers
    for child in model.base_model.children():
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
