"""Texts longer than a model's positions: RoPE scaling that the user asks for, and which one indexers were trained with.

The indexers turn their queries and keys by the model's own angles, so they belong to one scaling as they belong to
one model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dsa.runs.json_files import parse_json, shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FIXED = ("linear", "yarn", "llama3")
"""Scalings whose angles do not depend on the text's length: what is stored in a cache stays right."""

KEEPS_LENGTH = ("yarn", "llama3")
"""Those that need to know how many positions the model was trained on."""

OFF = "off"
"""The value that means no scaling."""

RopeScaling = dict[str, Any]


def parse_scaling(text: str) -> RopeScaling:
    """`"yarn:4"`, or JSON as transformers takes it, such as `{"rope_type": "yarn", "factor": 4.0}`.

    Raises:
        ValueError: Neither of them, an unknown kind, or a factor that is not above 1.
    """
    if text.lstrip().startswith("{"):
        scaling = parse_json(text, dict[str, Any], f"rope-scaling: {shown(text)}", "give it as transformers takes it")
        if "type" in scaling:
            scaling["rope_type"] = scaling.pop("type")
    else:
        kind, _, factor = text.partition(":")
        try:
            scaling = {"rope_type": kind, "factor": float(factor)}
        except ValueError:
            raise ValueError(
                f"rope-scaling must look like yarn:4 or linear:2, or be JSON as transformers takes it, got {text!r}"
            ) from None
    check_scaling(scaling)
    return scaling


def check_scaling(scaling: RopeScaling) -> None:
    """Refuses what cannot be honoured.

    Raises:
        ValueError: An unknown kind, or a factor that is not above 1.
    """
    kind, factor = scaling.get("rope_type"), scaling.get("factor")
    if kind not in FIXED:
        raise ValueError(
            f"rope-scaling: {kind!r} is not among {', '.join(FIXED)}; kinds whose angles change with the length of the "
            "text would not fit the index keys that are stored already"
        )
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 < factor < 1e4:
        raise ValueError(f"rope-scaling: the factor must be above 1 and below 10,000, got {factor!r}")


def extend_positions(config: PreTrainedConfig, scaling: RopeScaling) -> None:
    """Makes a configuration, before its model exists, that of a model with scaled RoPE and more positions.

    Args:
        config: Changed in place; one that has this very scaling already is left alone.
        scaling: As `parse_scaling` returns it.

    Raises:
        ValueError: The model has no RoPE, one for each kind of layer, or another scaling already; or transformers
            finds the scaling incomplete.
    """
    check_scaling(scaling)
    text = config.get_text_config(decoder=True)
    own = getattr(text, "rope_parameters", None)
    if not own or getattr(text, "max_position_embeddings", None) is None:
        raise ValueError(f"rope-scaling: {type(text).__name__} has no rotary positions to scale")
    if "rope_type" not in own:
        raise ValueError(
            f"rope-scaling: {type(text).__name__} has other angles for each kind of layer ({', '.join(own)}); scale "
            "them in its config.json"
        )
    if own["rope_type"] != "default":
        if all(own.get(name) == value for name, value in scaling.items()):
            return
        raise ValueError(
            f"rope-scaling: the model has {describe(scaling_of(config))} already, so {describe(scaling)} cannot be "
            "added; leave --rope-scaling out, or change its config.json"
        )
    trained = text.max_position_embeddings
    changed = {**own, **scaling}
    if scaling["rope_type"] in KEEPS_LENGTH:
        changed.setdefault("original_max_position_embeddings", trained)
    text.rope_parameters = changed
    text.max_position_embeddings = int(trained * scaling["factor"])
    missing = {"llama3": ("low_freq_factor", "high_freq_factor")}.get(scaling["rope_type"], ())
    if any(name not in changed for name in missing):
        raise ValueError(f"rope-scaling: llama3 needs {' and '.join(missing)}; give them as JSON")


def scaling_of(config: PreTrainedConfig) -> RopeScaling | None:
    """The RoPE scaling of a model as plain JSON; `None` for plain RoPE, and for models without."""
    own = getattr(config.get_text_config(decoder=True), "rope_parameters", None)
    if not own or own.get("rope_type", "default") == "default":
        return None
    kept = {name: value for name, value in own.items() if name not in ("rope_theta", "partial_rotary_factor")}
    return json.loads(json.dumps(kept, default=str))


def describe(scaling: RopeScaling | None) -> str:
    """A scaling in a few words."""
    if scaling is None:
        return "plain RoPE"
    return f"RoPE scaling {scaling.get('rope_type')}:{scaling.get('factor', 1):g}"


def depends_on_length(config: PreTrainedConfig) -> bool:
    """Whether the angles of a model's RoPE are others for a longer text."""
    return bool(angle_set(config, 0))


def angle_set(config: PreTrainedConfig, length: int) -> tuple[int, ...]:
    """Which angles a text of so many tokens is read with: the same numbers mean the same angles.

    Keys that were turned by one set do not fit queries of another. Empty where the angles do not depend on the length.
    """
    text, found = config.get_text_config(decoder=True), []
    for own in _kinds_of(config):
        kind = own.get("rope_type", "default")
        if kind == "longrope":
            trained = own.get("original_max_position_embeddings") or text.max_position_embeddings
            found.append(int(length > trained))
        elif "dynamic" in kind:
            found.append(length if length > text.max_position_embeddings else 0)
    return tuple(found)


def length_read(config: PreTrainedConfig, prompt: int, new: int) -> int:
    """The length whose angles a prompt is read with, when up to `new` tokens are to follow.

    With longrope all of them have one set. Dynamic scaling has another set for every length, and transformers writes
    each token with that of the length it makes: a prompt is read with its own.
    """
    kinds = [own.get("rope_type", "default") for own in _kinds_of(config)]
    return prompt if any("dynamic" in kind for kind in kinds) else prompt + new


def is_two_sets(config: PreTrainedConfig) -> bool:
    """Whether a text that grows past the length the model was first trained on has to be read again (longrope)."""
    return any(own.get("rope_type") == "longrope" for own in _kinds_of(config))


@contextmanager
def angles_for(model: Any, length: int) -> Iterator[None]:
    """Every pass within it turns by the angles of a text of `length` tokens, however few it reads itself.

    transformers chooses them by the last position of a pass: read in pieces, the first pieces of a long text would get
    those of a short one. Each rotary module is shown one position more, the last of the text, and its cosine and sine
    are taken off again. Models whose angles do not depend on the length are left alone.

    Args:
        model: A causal language model, or its decoder.
        length: Tokens of the whole text.
    """
    if not depends_on_length(model.config):
        yield
        return
    import torch

    def longer(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        last = positions.new_full((*positions.shape[:-1], 1), length - 1)
        positions = torch.cat([positions, last], dim=-1)
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    def shorter(_: Any, __: Any, ___: Any, made: Any) -> Any:
        return tuple(each[..., :-1, :] for each in made) if isinstance(made, tuple) else made[..., :-1, :]

    hooks, before = [], []
    for module in model.modules():
        names = [name for name in module._buffers if name.endswith("original_inv_freq")]
        if not names:
            continue
        before.append((module, _state_of(module, names)))
        # Dynamic angles remember the longest text that was read before.
        for name in names:
            prefix = name.removesuffix("original_inv_freq")
            device = getattr(module, f"{prefix}inv_freq").device
            setattr(module, f"{prefix}inv_freq", getattr(module, name).to(device).clone())
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
        hooks.append(module.register_forward_pre_hook(longer, with_kwargs=True))
        hooks.append(module.register_forward_hook(shorter, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, state in before:
            for name, value in state.items():
                setattr(module, name, value)


def _state_of(module: Any, names: list[str]) -> dict[str, Any]:
    """What a rotary module changes as it reads."""
    prefixes = [name.removesuffix("original_inv_freq") for name in names]
    kept = [
        f"{prefix}{part}" for prefix in prefixes for part in ("inv_freq", "max_seq_len_cached", "attention_scaling")
    ]
    return {name: getattr(module, name) for name in kept if hasattr(module, name)}


def _kinds_of(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The RoPE parameters of a model, those of each kind of layer where they differ."""
    own = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if "rope_type" in own:
        return [own]
    return [each for each in own.values() if isinstance(each, dict)]
