"""Caches that look as if a long text had been read, and what memory they and their readers take.

Shapes: `n` cached tokens, `H`/`G` query / KV heads, `D` head dim, `Hi`/`Di` index heads / index head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from dsa.models.families import born_with_dsa, family_of
from dsa.models.sparse import sparse_report_of
from dsa.modules.cache import indexed_layer
from dsa.modules.latents import latent_layer
from dsa.runs.memory import available_memory

SPARE_BYTES = 2 << 30


def filled_cache(model: Any, tokens: int, *, sparse: bool, reserved: int = 0) -> Any:
    """A cache of normal random keys and values, as if a text of so many tokens had been read.

    Args:
        model: Gives the shapes.
        tokens: How many are cached.
        sparse: Whether to make dsa's layers with index keys, as a sparse model does, or transformers' own.
        reserved: Room after the tokens, in dsa's layers.
    """
    config = model.config.get_text_config()
    born = born_with_dsa(config)
    generator = torch.Generator().manual_seed(tokens)
    key, value = (torch.randn(1, heads, tokens, dim, generator=generator) for heads, dim in _shapes(config))
    cache = DynamicCache(config=model.config)
    if not sparse:
        index_keys = torch.randn(1, tokens, config.index_head_dim, generator=generator) if born else None
        for layer in range(config.num_hidden_layers):
            cache.update(key, value, layer)
            if index_keys is not None:
                cache.update_indexer(index_keys, layer)
        return cache
    report = sparse_report_of(model)
    own = report.config
    index_keys = torch.randn(1, tokens, own.index_head_dim, generator=generator)
    for row in report.layers:
        has_indexer = own.has_indexer(row.layer)
        index_dtype = own.index_dtype if has_indexer else None
        stored: Any
        if born or family_of(model).latent is not None:
            stored = latent_layer(cache, row.layer, config.kv_lora_rank, index_dtype, kv_dtype=own.kv_dtype)
        else:
            stored = indexed_layer(cache, row.layer, index_dtype, own.kv_dtype)
        stored.reserve(tokens + reserved)
        if has_indexer:
            stored.append_index(index_keys)
        stored.update(key, value)
    return cache


def _shapes(config: Any) -> list[tuple[int, int]]:
    """Heads and dims of the two things that a layer caches: keys and values, or latents and rotated key dims."""
    if getattr(config, "kv_lora_rank", None):
        return [(1, config.kv_lora_rank), (1, config.qk_rope_head_dim)]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [(config.num_key_value_heads, head_dim)] * 2


def check_caches(model: Any, lengths: tuple[int, ...]) -> None:
    """Refuses caches of all these lengths that would not fit next to a plain one, before anything is filled.

    Raises:
        ValueError: They need more memory than is free.
    """
    config = model.config.get_text_config()
    dims = sum(heads * dim for heads, dim in _shapes(config))
    if born_with_dsa(config):
        dims += config.index_head_dim
    needed = (sum(lengths) + max(lengths)) * 4 * config.num_hidden_layers * dims
    if born_with_dsa(config):
        needed += _expanded_bytes(config, max(lengths))
    if not fits(needed):
        available = available_memory(torch.device("cpu")) or 0
        raise ValueError(
            f"lengths: caches of {', '.join(map(str, lengths))} tokens, sparse and dense, need "
            f"{(needed + SPARE_BYTES) / 1e9:.0f} GB, {available / 1e9:.0f} GB are free; name fewer or shorter ones "
            "with --lengths"
        )


def check_prompt(config: Any, tokens: int) -> None:
    """Refuses a prompt that transformers' path through a model born with DSA could not read.

    Raises:
        ValueError: It needs more memory than is free.
    """
    needed = masked_prefill_bytes(config, tokens)
    if not fits(needed):
        available = available_memory(torch.device("cpu")) or 0
        raise ValueError(
            f"lengths: transformers scores all pairs of {tokens:,} tokens at once and would take "
            f"{(needed + SPARE_BYTES) / 1e9:.0f} GB, {available / 1e9:.0f} GB are free; name shorter prompts with "
            "--lengths"
        )


def masked_prefill_bytes(config: Any, tokens: int) -> int:
    """What one layer of a model born with DSA takes at most when transformers reads a prompt: an estimate.

    Index scores `[n, Hi, n]` in fp32 are there twice while they are scaled. Masks, expanded keys and values are added.
    """
    return tokens**2 * (8 * config.index_n_heads + 16) + _expanded_bytes(config, tokens)


def _expanded_bytes(config: Any, tokens: int) -> int:
    """fp32 keys and values of every head, and what the keys are copied out of."""
    dims = 2 * config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return 4 * tokens * config.num_attention_heads * dims


def fits(needed: int) -> bool:
    """Whether so many bytes, and some to spare, are free; where the system does not say, they are."""
    available = available_memory(torch.device("cpu"))
    return available is None or needed + SPARE_BYTES <= available
