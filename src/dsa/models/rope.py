"""Texts longer than a model's positions: RoPE scaling that the user asks for, and which one indexers were trained with.

The indexers turn their queries and keys by the model's own angles, so they belong to one scaling as they belong to
one model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

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
        try:
            scaling = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"rope-scaling: {text!r} is not JSON ({error})") from error
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
