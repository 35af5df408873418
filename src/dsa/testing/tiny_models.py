"""Tiny random models, one of every family that dsa attaches to."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from dsa.config import DSAConfig
from dsa.models.families import ATTACHABLE

VOCABULARY = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}

_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}

_LATENT_AND_EXPERTS: dict[str, Any] = {
    **_LATENT,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}

# What a family needs beyond the common sizes; layers alternate where the family mixes windows and full attention.
_PARTICULAR: dict[str, dict[str, Any]] = {
    "axk1": _LATENT_AND_EXPERTS,
    "cohere2": {"num_hidden_layers": 4, "sliding_window": 8},
    # One layer with a feed-forward block and one with experts, which DeepSeek-V2 chooses greedily.
    "deepseek_v2": {**_LATENT_AND_EXPERTS, "first_k_dense_replace": 1},
    "deepseek_v3": {**_LATENT_AND_EXPERTS, "first_k_dense_replace": 1, "num_mtp_layers": 0},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe_lite": _LATENT_AND_EXPERTS,
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "minicpm3": {**_LATENT, "scale_emb": 2, "dim_model_base": 16},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None},
    "phi3": {"sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": False},
    "starcoder2": {"sliding_window": None},
    "youtu": _LATENT,
}

TINY_CONFIG = DSAConfig(top_k=8, index_heads=2, index_head_dim=8, sinks=1, local=2)
"""A budget small enough that texts of a few dozen tokens are read sparsely."""


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model of that family, in evaluation mode.

    Weights are larger than a fresh model's, so that attention is peaked and logits tell tokens apart.

    Args:
        model_type: A key of `dsa.models.families.ATTACHABLE`.
        seed: Of the weights.
        **changes: Fields of the model's configuration.
    """
    family = ATTACHABLE[model_type]
    sizes = {**_COMMON, **_PARTICULAR.get(model_type, {}), **changes}
    if model_type == "gpt2":
        for name in ("intermediate_size", "num_key_value_heads", "head_dim", "attention_dropout"):
            sizes.pop(name)
    torch.manual_seed(seed)
    model = family.model_class()(family.config_class()(**sizes)).eval()
    # The grouped experts kernel does not take fp64, which tests use.
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model


def tiny_tokens(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, tokens]` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
