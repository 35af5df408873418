"""One attention layer of DeepSeek-V3.2's real shape: a long prefill, and a decoding step over a long cache.

    python benchmarks/native_layer.py prefill --tokens 32768
    python benchmarks/native_layer.py decode --tokens 131072 --peer-tokens 16384 --json result.json

Weights are random. Decoding is compared with torch's fused attention over expanded keys and values, at a length that
fits in memory; a peer's step grows with its length, so the same step at `--tokens` would take longer in proportion.
The peer's step is attention alone: projections, the indexer and the new token's expansion are left out of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention, DeepseekV32RotaryEmbedding

from dsa.config import DSAConfig
from dsa.eval.machine import describe_machine
from dsa.models.layer import LayerPlan
from dsa.models.native.attention import LatentAttention
from dsa.models.native.families import NATIVE_FAMILIES
from dsa.modules.latents import latent_layer

REPEATS = 5


def make_layer() -> tuple[LatentAttention, DeepseekV32RotaryEmbedding, DeepseekV32Config]:
    config = DeepseekV32Config(num_hidden_layers=1)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    plan = LayerPlan(0, DSAConfig(top_k=config.index_topk, sinks=0, local=0, index_dtype="fp32"))
    layer = LatentAttention(DeepseekV32Attention(config, 0).eval(), plan, NATIVE_FAMILIES["deepseek_v32"])
    return layer, DeepseekV32RotaryEmbedding(config), config


def check(layer: LatentAttention, rotary: DeepseekV32RotaryEmbedding, config: DeepseekV32Config) -> float:
    """Largest difference from transformers' eager layer on few tokens and a small budget."""
    small = copy.copy(config)
    small.index_topk = 64
    original = DeepseekV32Attention(small, 0).eval()
    original.load_state_dict(layer.state_dict())
    plan = LayerPlan(0, DSAConfig(top_k=64, sinks=0, local=0, index_dtype="fp32"))
    ours = LatentAttention(original, plan, NATIVE_FAMILIES["deepseek_v32"])
    hidden = torch.randn(1, 256, config.hidden_size)
    angles = rotary(hidden, torch.arange(256)[None])
    causal = torch.full((256, 256), torch.finfo(torch.float32).min).triu(1)[None, None]
    return float((ours(hidden, angles)[0] - original(hidden, angles, causal)[0]).abs().max())


def prefill(layer: LatentAttention, rotary: DeepseekV32RotaryEmbedding, config: Any, tokens: int) -> dict[str, Any]:
    hidden = torch.randn(1, tokens, config.hidden_size)
    angles = rotary(hidden, torch.arange(tokens)[None])
    began = time.perf_counter()
    layer(hidden, angles, past_key_values=DynamicCache(config=config))
    seconds = time.perf_counter() - began
    eager = 4 * tokens * tokens * (config.index_n_heads + config.num_attention_heads) / 1e9
    return {"tokens": tokens, "prefill_s": seconds, "eager_scores_gb": eager}


def decode(
    layer: LatentAttention, rotary: DeepseekV32RotaryEmbedding, config: Any, tokens: int, peer: int
) -> dict[str, Any]:
    cache = DynamicCache(config=config)
    stored = latent_layer(cache, 0, config.kv_lora_rank, "fp32")
    stored.reserve(tokens + REPEATS + 2)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    stored.append_index(torch.randn(1, tokens, config.index_head_dim))
    stored.append_rows(torch.randn(1, tokens, width))
    times = []
    for step in range(REPEATS + 1):
        hidden = torch.randn(1, 1, config.hidden_size)
        angles = rotary(hidden, torch.tensor([[tokens + step]]))
        began = time.perf_counter()
        layer(hidden, angles, past_key_values=cache)
        times.append(time.perf_counter() - began)
    heads, key_dim = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
    query = torch.randn(1, heads, 1, key_dim)
    key, value = torch.randn(1, heads, peer, key_dim), torch.randn(1, heads, peer, config.v_head_dim)
    theirs = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        F.scaled_dot_product_attention(query, key, value)
        theirs.append(time.perf_counter() - began)
    ours, sdpa = sorted(times[1:])[REPEATS // 2], sorted(theirs[1:])[REPEATS // 2]
    return {
        "tokens": tokens,
        "step_ms": 1e3 * ours,
        "peer_tokens": peer,
        "peer_attention_ms": 1e3 * sdpa,
        "peer_in_proportion_ms": 1e3 * sdpa * tokens / peer,
        "speedup_in_proportion": sdpa * tokens / peer / ours,
        "index_keys_mb": 4e-6 * tokens * config.index_head_dim,
        "selected_rows_mb": 4e-6 * config.index_topk * width,
        "weights_mb": 4e-6 * sum(parameter.numel() for parameter in layer.parameters()),
        "expanded_mb": 4e-6 * tokens * heads * (key_dim + config.v_head_dim),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prefill", "decode"))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--peer-tokens", type=int, default=16384, help="length of the expanded keys and values")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    layer, rotary, config = make_layer()
    result: dict[str, Any] = {"largest_difference_from_eager": check(layer, rotary, config)}
    if given.what == "prefill":
        result |= prefill(layer, rotary, config, given.tokens)
    else:
        result |= decode(layer, rotary, config, given.tokens, given.peer_tokens)
    result["peak_rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    result["environment"] = describe_machine(torch.device("cpu"))
    text = json.dumps(result, indent=1, default=str)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
