"""The row that a model needs, found by running it: nothing is taken from its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch

from dsa.models.families import AngleLayout, Family, RopeLayers, RopeLayout, attention_name, full_attention_layers

Pairs = RopeLayout | Literal["configured"]
TEXT = 12
SWITCHES: tuple[RopeLayers, ...] = ("use_rope", "force_rope")


def find_family(model: Any) -> Family:
    """The row of the table that describes a model, read from its modules and from what passes between them.

    Args:
        model: A small model in evaluation mode that is not attached; it is run a few times.

    Raises:
        ValueError: No row can describe it; the message says what is in the way.
    """
    family = Family(model.config.model_type)
    full = [layer for layer, whole in enumerate(full_attention_layers(model.config)) if whole]
    blocks = family.blocks(model)
    _check_reachable(model, blocks, full)
    attentions = {layer: getattr(blocks[layer], str(attention_name(blocks[layer]))) for layer in full}
    latent = hasattr(attentions[full[0]], "kv_a_proj_with_mqa")
    angles, plain = _angles(model, attentions)
    if angles is None:
        return family
    family = replace(family, rope=_layout(angles))
    turning = {layer: _turns(model, attention, plain) for layer, attention in attentions.items()}
    if latent:
        pairs: Pairs = "configured" if hasattr(model.config, "rope_interleave") else "half"
        return replace(family, latent=pairs if family.rope != "single" else "interleaved")
    return replace(family, rope_layers=_which(turning, attentions))


def _check_reachable(model: Any, blocks: list[Any], full: list[int]) -> None:
    name = type(model).__name__
    if not full:
        raise ValueError(f"{name} has nothing to select: none of its layers sees all earlier tokens")
    if not blocks:
        raise ValueError(f"{name} keeps its decoder layers in no list of num_hidden_layers modules")
    without = [layer for layer in full if attention_name(blocks[layer]) is None]
    if without:
        raise ValueError(
            f"layer {without[0]} of {name} has its attention under no known name; it has "
            f"{', '.join(name for name, _ in blocks[without[0]].named_children())}"
        )


def _angles(model: Any, attentions: dict[int, Any]) -> tuple[Any, torch.Tensor]:
    """What the first full-attention layer is handed to turn by, and the logits; a text of different positions."""
    seen: list[Any] = []

    def look(angles: Any) -> Any:
        seen.append(angles)
        return angles

    with _handed(next(iter(attentions.values())), look):
        logits = _logits(model)
    return seen[0], logits


def _layout(angles: Any) -> AngleLayout:
    if isinstance(angles, torch.Tensor):
        return "single"
    cos = angles[0][0, -1]
    half = cos.numel() // 2
    if torch.equal(cos[:half], cos[half:]):
        return "half"
    return "interleaved" if torch.equal(cos[0::2], cos[1::2]) else "single"


def _turns(model: Any, attention: Any, plain: torch.Tensor) -> bool:
    """Whether other angles change what a layer computes."""

    def earlier(angles: Any) -> Any:
        if angles is None:
            return None
        return angles.flip(1) if isinstance(angles, torch.Tensor) else tuple(each.flip(1) for each in angles)

    with _handed(attention, earlier):
        return not torch.equal(_logits(model), plain)


def _which(turning: dict[int, bool], attentions: dict[int, Any]) -> RopeLayers:
    for name in SWITCHES:
        if all(getattr(attentions[layer], name, None) is not None for layer in turning) and all(
            bool(getattr(attentions[layer], name)) == turns for layer, turns in turning.items()
        ):
            return name
    if all(turning.values()):
        return "all"
    if all((getattr(attentions[layer], "sliding_window", 0) is None) == turns for layer, turns in turning.items()):
        return "without_window"
    if not any(turning.values()):
        return "none"
    layers = ", ".join(str(layer) for layer, turns in turning.items() if not turns)
    raise ValueError(f"full-attention layers {layers} do not turn their keys, and no attribute of theirs says so")


@contextmanager
def _handed(attention: Any, change: Callable[[Any], Any]) -> Iterator[None]:
    """Has an attention layer receive other angles in place of its own, wherever they stand among its arguments."""
    names = list(inspect.signature(attention.forward).parameters)

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "position_embeddings" in kwargs or "position_embeddings" not in names[: len(args)]:
            given = change(kwargs.get("position_embeddings"))
            return args, ({**kwargs, "position_embeddings": given} if "position_embeddings" in kwargs else kwargs)
        place = names.index("position_embeddings")
        return (*args[:place], change(args[place]), *args[place + 1 :]), kwargs

    handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return model(torch.randint(3, vocabulary, (1, TEXT), generator=generator), use_cache=False).logits
