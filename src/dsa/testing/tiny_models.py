"""Tiny random models, one of every family that dsa attaches to."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from dsa.check.miniature import VOCABULARY, miniature, random_model
from dsa.config import DSAConfig
from dsa.models.families import ATTACHABLE

_NO_WINDOW = {"sliding_window": None}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}

# What a family needs beyond `miniature`: where its class's defaults have only windows, or sizes of other names.
_PARTICULAR: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": {"n_group": 2, "topk_group": 1},
    "deepseek_v3": {"num_mtp_layers": 0},
    "dots1": {"n_shared_experts": 1, "num_hidden_layers": 2},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gemma4_text": {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8},
    "granitemoehybrid": {**_MAMBA, **_LINEAR_THEN_FULL},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "minicpm3": {"scale_emb": 2, "dim_model_base": 16},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    "ministral3": _NO_WINDOW,
    "mistral": _NO_WINDOW,
    "mixtral": _NO_WINDOW,
    "phi3": _NO_WINDOW,
    "phimoe": _NO_WINDOW,
    "starcoder2": _NO_WINDOW,
}

TINY_CONFIG = DSAConfig(top_k=8, index_heads=2, index_head_dim=8, sinks=1, local=2)
"""A budget small enough that texts of a few dozen tokens are read sparsely."""


ONE_OF_EACH_KIND = (
    *("llama", "gpt2", "gpt_neox", "phi3", "mixtral", "cohere2", "gemma3_text", "gpt_oss", "smollm3", "llama4_text"),
    *("qwen3_next", "deepseek_v2", "deepseek_v3", "minicpm3", "axk1"),
)
"""Families that differ in what most code could notice; `tests/models/test_families.py` takes all."""


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model of that family, in evaluation mode; see `dsa.check.miniature`.

    Args:
        model_type: A key of `dsa.models.families.ATTACHABLE`.
        seed: Of the weights.
        **changes: Fields of the model's configuration.
    """
    family = ATTACHABLE[model_type]
    original: Any = family.config_class()()
    # Grouped queries wherever the family has them: a class's defaults often give every head its own keys.
    grouped = "num_key_value_heads" in original.to_dict() and family.latent is None
    groups = {"num_key_value_heads": 2} if grouped else {}
    config = miniature(original, **{**groups, **_PARTICULAR.get(model_type, {}), **changes})
    return random_model(family.model_class(), config, seed)


def tiny_tokens(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, tokens]` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
