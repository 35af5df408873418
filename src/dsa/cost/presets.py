"""Sizes of well-known models by name, so that their cost can be asked for without downloading anything.

Each entry holds the fields of the model's own `config.json` that `dsa.cost.model_config` needs, under their own names.
"""

from __future__ import annotations

import difflib
from typing import Any


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


def _qwen3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    common = {"head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "use_sliding_window": False}
    return _llama(hidden, inner, layers, heads, kv_heads, **common, **{"model_type": "qwen3", **more})


def _smollm2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    more = {"vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192}
    return _llama(hidden, inner, layers, heads, kv_heads, **more)


_DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "tie_word_embeddings": False,
    "max_position_embeddings": 163840,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Llama 3 report, arXiv 2407.21783, table 3; config.json of meta-llama/Meta-Llama-3-8B.
    "Llama-3-8B": _llama(
        4096, 14336, 32, 32, 8, vocab_size=128256, tie_word_embeddings=False, max_position_embeddings=8192
    ),
    # Qwen3 report, arXiv 2505.09388, tables 1 and 2; config.json of Qwen/Qwen3-*.
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, 8, tie_word_embeddings=True),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, 8, tie_word_embeddings=False),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64, 8, tie_word_embeddings=False),
    "Qwen3-30B-A3B": _qwen3(
        2048,
        6144,
        48,
        32,
        4,
        tie_word_embeddings=False,
        model_type="qwen3_moe",
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    # SmolLM2 report, arXiv 2502.02737, section 6 and config.json of HuggingFaceTB/SmolLM2-*.
    "SmolLM2-135M": _smollm2(576, 1536, 30, 9, 3),
    "SmolLM2-360M": _smollm2(960, 2560, 32, 15, 5),
    "SmolLM2-1.7B": _smollm2(2048, 8192, 24, 32, 32),
    # DeepSeek-V3 report, arXiv 2412.19437, section 4.2; transformers' DeepseekV3Config.
    "DeepSeek-V3": _DEEPSEEK_V3,
    # DeepSeek-V3.2 report, arXiv 2512.02556, section 2: V3 with indexers; transformers' DeepseekV32Config.
    "DeepSeek-V3.2": {
        **_DEEPSEEK_V3,
        "model_type": "deepseek_v32",
        "index_topk": 2048,
        "index_n_heads": 64,
        "index_head_dim": 128,
    },
    # transformers' GlmMoeDsaConfig, whose defaults are zai-org/GLM-5.
    "GLM-5": {
        "model_type": "glm_moe_dsa",
        "vocab_size": 154880,
        "hidden_size": 6144,
        "intermediate_size": 12288,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 78,
        "num_attention_heads": 64,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 2048,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 202752,
        "index_topk": 2048,
        "index_n_heads": 32,
        "index_head_dim": 128,
    },
}


def find_preset(name: str) -> str | None:
    """The preset of that name, whatever its capitals; `None` where there is none."""
    return next((known for known in PRESETS if known.lower() == name.lower()), None)


def nearest_presets(name: str) -> list[str]:
    """Presets whose names are like that one, the likest first; all of them where none is."""
    by_lower = {known.lower(): known for known in PRESETS}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return [by_lower[lower] for lower in near] or list(PRESETS)
