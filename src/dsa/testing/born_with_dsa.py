"""Small random models of the families born with DSA."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from transformers import PreTrainedModel

from dsa.models.families import BORN_WITH_DSA

_TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "qk_nope_head_dim": 16,
    # Sixteen index heads: with few, many scores are exactly zero and every rule for ties selects other tokens.
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MEDIUM: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "qk_nope_head_dim": 32,
    "index_n_heads": 32,
    "index_head_dim": 32,
    "index_topk": 48,
    "max_position_embeddings": 1024,
}
"""Changes that make a model large enough for several blocks of everything."""

SHARED_TYPES = ["full", "shared", "full", "shared"]


def born_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model of that family, in evaluation mode, with transformers' eager attention.

    Args:
        model_type: A key of `dsa.models.families.BORN_WITH_DSA`.
        seed: Of the weights.
        **changes: Fields of the model's configuration.
    """
    family = BORN_WITH_DSA[model_type]
    package = f"transformers.models.{model_type}"
    config = getattr(importlib.import_module(f"{package}.configuration_{model_type}"), family.config)
    model_class = getattr(importlib.import_module(f"{package}.modeling_{model_type}"), family.causal_lm)
    sizes = {**_TINY, **changes}
    if family.shares and "indexer_types" not in changes:
        sizes["indexer_types"] = (SHARED_TYPES * sizes["num_hidden_layers"])[: sizes["num_hidden_layers"]]
    torch.manual_seed(seed)
    model = model_class._from_config(config(**sizes), attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model
