"""Reading one text with dense attention, with DSA and with other selections, on the same attached model.

Texts of any length are read in chunks into a cache, as `dsa generate` reads prompts, so that memory stays that of the
cache and one chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from dsa.config import DSAConfig, LayerConfig
from dsa.eval.reading import token_losses
from dsa.eval.selections import SELECTIONS, selection
from dsa.models.acceleration import cache_of
from dsa.models.attachment import Attachment, detach, put_on
from dsa.models.context import DSAContext
from dsa.models.decoder import decoder_output
from dsa.models.rope import angles_for
from dsa.modules.cache import reserve

CHUNK = 8192
"""Tokens read at once."""

READERS = ("dense", "dsa", *SELECTIONS)
"""Who decides what a sparse layer reads."""

ContextMaker = Callable[[], DSAContext]


def contexts(reader: str, config: DSAConfig, seed: int = 0) -> ContextMaker:
    """Makes the context of each forward pass in which `reader` decides what is read.

    Args:
        reader: `"dense"`, `"dsa"`, or a selection of `dsa.eval.selections`.
        config: What the model is attached with.
        seed: Of the random selection.

    Raises:
        ValueError: No such reader.
    """
    if reader == "dense":
        return lambda: DSAContext(mode="dense")
    if reader == "dsa":
        return DSAContext
    chosen = selection(reader, config, seed)
    return lambda: DSAContext(select=chosen)


@torch.no_grad()
def text_losses(model: Any, ids: torch.Tensor, start: int, context: ContextMaker) -> torch.Tensor:
    """What each token after position `start` costs, in nats.

    Args:
        model: An attached model.
        ids: int64 `[1, n]`.
        start: First position whose prediction of the next token counts.
        context: Makes the context of each chunk.

    Returns:
        fp64 `[n - 1 - start]` on the CPU.

    Raises:
        ValueError: The model's output is not finite.
    """
    ids = ids.to(model.device)
    # Without a cache FP8 rows would not be rounded, and nothing of them be measured.
    cached = ids.shape[1] > CHUNK or cache_of(model) == "fp8"
    cache = new_cache(model, ids.shape[1]) if cached else None
    with decoder_output(model) as captured:
        read_chunks(model, ids, cache, context)
    output = copy.copy(captured[-1])
    output.past_key_values = None
    output.last_hidden_state = torch.cat([each.last_hidden_state for each in captured], dim=1)
    captured.clear()
    return token_losses(model, output, ids, start)


@torch.no_grad()
def read_chunks(model: Any, ids: torch.Tensor, cache: Any, context: ContextMaker, *, length: int | None = None) -> None:
    """Reads `ids` `[1, n]`, a chunk at a time where there is a cache to put them in.

    `length` says how long the text is to become, for RoPE whose angles depend on it; by default `n`.
    """
    with angles_for(model, length or ids.shape[1]):
        for chunk in ids.split(CHUNK, dim=1) if cache is not None else [ids]:
            model(
                chunk,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=1,
                dsa_context=context(),
            )


def new_cache(model: Any, tokens: int) -> DynamicCache:
    """A cache with room for so many tokens."""
    cache = DynamicCache(config=model.config)
    reserve(cache, tokens)
    return cache


@contextmanager
def attached(model: Any, taken: Attachment, overrides: Mapping[str, Any]) -> Iterator[DSAConfig]:
    """Puts the indexers on a model that is not attached while the context is open; yields its configuration."""
    report = put_on(model, taken, **overrides)
    try:
        yield report.config
    finally:
        detach(model)


def budget(config: DSAConfig, top_k: int, local: int | None = None, dense: list[int] | None = None) -> dict[str, Any]:
    """Fields to change for one budget in all sparse layers.

    Args:
        config: What the indexers came with.
        top_k: `K`.
        local: Most recent tokens always read; `None` keeps the configuration's, or half of `K` where that is less.
        dense: Layers to leave dense, in place of the configuration's.
    """
    changes: dict[str, Any] = {"top_k": top_k, "local": min(config.local, top_k // 2) if local is None else local}
    if dense is not None:
        changes["layers"] = {layer: LayerConfig(dense=True) for layer in dense}
    return changes
