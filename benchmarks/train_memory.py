#!/usr/bin/env python3
"""Memory of one warm-up step of one attention layer shaped like Llama-3-8B's, beyond its activations in and out.

    python benchmarks/train_memory.py                       # 131,072 tokens, bf16
    python benchmarks/train_memory.py --tokens 32768 --device cuda --json out.json

The layer (hidden 4096, 32 heads, 8 KV heads of 128) reads a random sequence with full attention in chunks, as
`dsa train` does for long sequences, then its indexer learns from `--queries` of the queries. What is counted is the
highest memory during that, less what was there before (weights, hidden states) and less the layer's output.

The peak of a chunk grows with the keys before it, so the last chunk decides. On a CPU full attention of all chunks
would take most of an hour; `--attend 1` (the default there) computes that of the last chunk only, and everything
else of all. On a GPU all of it is computed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dsa
from dsa.models import config_of, indexers_of
from dsa.models.context import AttentionCall, DSAContext
from dsa.models.layer import LayerAttention
from dsa.runs.machine import describe_machine, peak_rss_mb, reset_peak_rss
from dsa.train import WarmupSettings
from dsa.train.chunked import chunked
from dsa.train.layer import LayerTrainer
from dsa.train.warmup import CHUNK


def make_layer(heads: int, dim: int, small: bool, device: str) -> Any:
    """A model whose only layer has Llama-3-8B's attention; everything else in it is tiny."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2} if small else {}
    sizes = sizes or {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(
        **sizes, num_hidden_layers=1, intermediate_size=64, vocab_size=64, max_position_embeddings=1 << 20
    )
    model = LlamaForCausalLM(config).to(device, torch.bfloat16).eval()
    dsa.attach(model, index_heads=heads, index_head_dim=dim)
    return model


def attend_in_the_last(chunks: int, tokens: int) -> None:
    """Leaves out the attention of all chunks but the last: their outputs are zeros."""
    whole = LayerAttention.dense

    def dense(self: Any) -> torch.Tensor:
        if self.key.shape[1] <= tokens - chunks * CHUNK:
            return torch.zeros_like(self.query)
        return whole(self)

    LayerAttention.dense = dense  # type: ignore[method-assign]


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """One step; figures in MB (10^6 bytes) and seconds."""
    torch.manual_seed(0)
    model = make_layer(given.index_heads, given.index_head_dim, given.small, given.device)
    layer = model.model.layers[0].self_attn
    hidden = torch.randn(1, given.tokens, model.config.hidden_size, dtype=torch.bfloat16, device=given.device)
    places = torch.arange(given.tokens, device=given.device)[None]
    angles = model.model.rotary_emb(hidden, places)
    settings = WarmupSettings(steps=1, seq_len=given.tokens, queries_per_update=given.queries, updates_per_sequence=1)
    settings = settings.resolved(config_of(model), [0])
    trainer = LayerTrainer(0, indexers_of(model)[0], config_of(model), settings)
    drawn = torch.randperm(given.tokens - 1000, device=given.device)[: given.queries]
    rows = (1000 + drawn).sort().values[None, None]
    losses: list[torch.Tensor] = []

    def observe(call: AttentionCall, query_of: Any) -> None:
        losses.append(trainer.train(call, rows, 0, query_of)[0])

    if given.attend is not None:
        attend_in_the_last(given.attend, given.tokens)
    on_gpu = given.device.startswith("cuda")
    reset_peak_rss()
    before = torch.cuda.memory_allocated() / 1e6 if on_gpu else peak_rss_mb()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with torch.no_grad(), chunked(model, CHUNK, observe):
        out, _ = layer(
            hidden_states=hidden,
            position_embeddings=angles,
            attention_mask=None,
            dsa_context=DSAContext(mode="dense"),
        )
    loss = float(losses[0])
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_rss_mb()
    return {
        "tokens": given.tokens,
        "chunk": CHUNK,
        "hidden_size": model.config.hidden_size,
        "index_heads": given.index_heads,
        "index_head_dim": given.index_head_dim,
        "queries": given.queries,
        "attended_chunks": given.attend,
        "activations_in_and_out_mb": 2 * hidden.nbytes / 1e6,
        "beyond_mb": peak - before - out.nbytes / 1e6,
        "loss": loss,
        "seconds": seconds,
        "environment": describe_machine(torch.device(given.device)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--queries", type=int, default=512, help="of the update")
    parser.add_argument("--index-heads", type=int, default=4)
    parser.add_argument("--index-head-dim", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attend", type=int, help="compute attention in the last so many chunks; on a CPU 1")
    parser.add_argument("--small", action="store_true", help="a layer of 256 dims, to try the command")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    if given.attend is None and given.device == "cpu":
        given.attend = 1
    figures = measure(given)
    print(
        f"{figures['tokens']:,} tokens: {figures['beyond_mb']:,.0f} MB beyond the "
        f"{figures['activations_in_and_out_mb']:,.0f} MB of activations in and out, {figures['seconds']:.1f} s, "
        f"loss {figures['loss']:.4f}"
    )
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
