"""Small random models: a configuration whose sizes are made small, with the same kinds of layers in the same order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 97

_MAY_BE_ABSENT = ("sliding_window", "attention_chunk_size", "q_lora_rank", "n_group", "topk_group")
KEPT_ROPE = ("default", "linear", "yarn", "llama3")
"""Kinds of RoPE whose parameters fit any width and do not turn with the length of the text."""
MROPE = [2, 1, 1]
"""Pairs turned by time, height and width."""

SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    # Latent attention.
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    # Mixtures of experts, from the second layer on.
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    # Linear attention and state-space layers.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
}
"""Sizes of models that are made in a moment. Only what a configuration has and does not leave empty is set."""

_NOT_ARGUMENTS = ("model_type", "architectures", "transformers_version", "_name_or_path", "dtype", "auto_map")


def miniature(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    """A small configuration of the same class: its first layers, as many as have one of each kind.

    Args:
        config: A text model's configuration.
        **changes: Fields that are to be as given.

    Raises:
        ValueError: The class refuses the small sizes; also other errors of the class itself.
    """
    text = config.get_text_config(decoder=True)
    count = text.num_hidden_layers
    # Lists by layer are cut to the layers asked for.
    kept = changes.get("num_hidden_layers", _layers_with_each_kind(text, count))
    given = {name: value for name, value in text.to_dict().items() if name not in _NOT_ARGUMENTS}
    small = {name: _small(value, name, count, kept) for name, value in given.items()}
    for name, size in {**SIZES, "num_hidden_layers": kept}.items():
        real = text.attribute_map.get(name, name)
        if real in given and not (given[real] is None and name in _MAY_BE_ABSENT):
            small[real] = size
    groups = given.get("num_key_value_heads")
    if groups is not None:
        small["num_key_value_heads"] = {text.num_attention_heads: 4, 1: 1}.get(groups, 2)
    return type(text)(**{**small, **changes})


def _layers_with_each_kind(config: PreTrainedConfig, count: int) -> int:
    """How many of the first layers have one of each kind among them, two at least."""
    types, _ = get_layer_types_and_kwargs(config)
    others = (getattr(config, name, None) or [None] * count for name in ("mlp_layer_types", "no_rope_layers"))
    kinds = list(zip(types, *others))
    last = max((kinds.index(kind) for kind in set(kinds)), default=0)
    return min(count, max(2, last + 1))


def _small(value: Any, name: str, count: int, kept: int) -> Any:
    """A field of the small configuration: lists by layer cut, no dropout, plain RoPE."""
    if isinstance(value, list) and len(value) == count:
        return value[:kept]
    if name == "per_layer_config" and isinstance(value, dict):
        return {layer: own for layer, own in value.items() if int(layer) < kept}
    if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
        return 0.0
    if isinstance(value, dict) and name == "rope_parameters":
        return _plain_rope(value)
    return value


def _plain_rope(given: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters without what belongs to a length or a width; those of each kind of layer where they differ."""
    kept = {name: _plain_rope(value) if isinstance(value, dict) else value for name, value in given.items()}
    if kept.get("rope_type", "default") not in KEPT_ROPE:
        kept = {name: kept[name] for name in ("rope_theta", "partial_rotary_factor") if kept.get(name) is not None}
        kept["rope_type"] = "default"
    if "mrope_section" in kept:
        kept["mrope_section"] = MROPE
    return kept


def random_model(model_class: Any, config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in evaluation mode.

    Weights are larger than a fresh model's, so that attention is peaked and logits tell tokens apart.
    """
    torch.manual_seed(seed)
    model = model_class(config).eval()
    # The grouped experts kernel does not take fp64, which tests use.
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model
