"""Multi-head latent attention in its absorbed form, over the rows that an indexer selects.

The indexer is the model's own, or one that `dsa.attach` gave it.

A head's keys and values are linear maps of one row a token: `k = [U_k c; r]`, `v = U_v c`, with the latent `c` and the
rotated dims `r` that all heads share. Then `q . k = (q_c U_k) . c + q_r . r`, so a query is mapped into the row's frame
once, attends to the rows themselves (one KV head of `L + R` dims, whose first `L` are the values), and what it mixed
goes through `U_v`. Keys and values of the heads never exist.

Shapes: `B` batch, `T` query tokens, `t` of them at a time, `S` key tokens, `H` heads, `N`/`V` head dims without RoPE /
of values, `L` latent dims, `Lq` those of the query latent, `R` rotated dims, `Hi`/`Di` index heads / index head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from dsa.models.context import DSAContext
from dsa.models.families import LatentLayout, RopeLayout
from dsa.models.layer import Block, LayerAttention, LayerIndex, LayerPlan, attend, causal_ranges
from dsa.models.masks import split_mask
from dsa.modules.cache import IndexKeys, stored_form
from dsa.modules.latents import CacheDtype, LatentLayer, latent_layer
from dsa.ops import PackedLatents
from dsa.ops.index_projection import Rope, rope_tables, rotate_half_split
from dsa.ops.packed_latents.gradient import without_gradient

Angles = tuple[torch.Tensor, torch.Tensor] | torch.Tensor
"""What a decoder hands to its layers: `cos, sin`, or in DeepSeek-V2 complex numbers `[B or 1, T, R/2]`."""

QUERY_BYTES = 64 << 20
"""Absorbed queries held at once: `L + R` dims a head are several times what a head had."""


class LatentAttention(nn.Module):
    """Replaces a model's attention module, and has its submodules under their names.

    Args:
        original: The module whose submodules it computes with.
        plan: Layer number and budget.
        layout: Which dims RoPE turns.
        cache: How a cache keeps the rows.
    """

    # The original's own, under its names: projections, norms, and the indexer, which shared layers do not have. Models
    # without a query latent have `q_proj` instead of the next three.
    q_proj: Any
    q_a_proj: Any
    q_a_layernorm: Any
    q_b_proj: Any
    kv_a_proj_with_mqa: Any
    kv_a_layernorm: Any
    kv_b_proj: Any
    o_proj: Any
    indexer: Any

    def __init__(self, original: Any, plan: LayerPlan, layout: LatentLayout, cache: CacheDtype = "full") -> None:
        super().__init__()
        self.plan, self.layout, self.cache = plan, layout, cache
        self.config = original.config
        self.layer_idx = plan.layer
        self.attention_dropout: float = original.attention_dropout
        self.scaling = float(original.scaling)
        self.heads: int = original.num_heads
        self.nope_dim: int = original.qk_nope_head_dim
        self.rope_dim: int = original.qk_rope_head_dim
        self.latent_dim: int = original.kv_lora_rank
        self.has_query_latent = original.q_lora_rank is not None
        self._modules.update(original._modules)
        if getattr(original, "indexer", None) is None:
            self.indexer = None
        self.train(original.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Angles,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        dsa_context: DSAContext | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, None]:
        """As the module that it replaces; `[B, T, hidden_size]`, and no weights.

        The third value, where a family has one, is the selection handed to the next layer; here it is in the context.

        Raises:
            NotImplementedError: Attention dropout, or a mask that is not ranges of positions.
        """
        if self.training and self.attention_dropout:
            raise NotImplementedError(
                "dsa does not apply attention dropout; set the model's attention dropout to 0 to train it sparse"
            )
        context = dsa_context if dsa_context is not None else DSAContext()
        rope = self.rope_of(position_embeddings, context)
        stored = None
        if past_key_values is not None:
            dtype = self.plan.config.index_dtype if self.indexer is not None else None
            kv_dtype = self.plan.config.kv_dtype
            stored = latent_layer(past_key_values, self.plan.layer, self.latent_dim, dtype, self.cache, kv_dtype)
        index_key = None if self.indexer is None else self._index_keys(hidden_states, rope, stored)
        new = self._rows(hidden_states, rope)
        rows = new if stored is None else stored.append_rows(new)
        mask, tokens, keys = attention_mask, hidden_states.shape[1], rows.shape[1]
        start, end, kept = context.once("mask", mask, lambda: split_mask(mask, tokens, keys))
        out = self._attend(hidden_states, rope, rows, (start, end, kept), index_key, context)
        return (out, None, None) if self.layout.shares else (out, None)

    def _attend(
        self,
        hidden_states: torch.Tensor,
        rope: Rope,
        rows: torch.Tensor | PackedLatents,
        visible: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
        index_key: IndexKeys | None,
        context: DSAContext,
    ) -> torch.Tensor:
        """Queries, selection and attention of all tokens, a block of them at a time; `[B, T, hidden_size]`."""
        plan, tokens, keys = self.plan, hidden_states.shape[1], rows.shape[1]
        start, end, kept = visible
        observed = context.observer is not None or context.select is not None
        dense = plan.runs_dense(keys, context)
        packed = isinstance(rows, PackedLatents)
        if isinstance(rows, PackedLatents) and (observed or (dense and tokens > 1)):
            # Observers see numbers; and many queries that read all rows would each decode them again.
            rows = rows.unpack(hidden_states.dtype)
        key = rows if isinstance(rows, PackedLatents) else rows.unsqueeze(2)
        value = None if isinstance(key, PackedLatents) else key[..., : self.latent_dim]
        per_token = hidden_states.shape[0] * self.heads * rows.shape[-1] * hidden_states.element_size()
        whole = context.observer is not None or torch.is_grad_enabled()
        block = tokens if whole else max(1, QUERY_BYTES // per_token)
        if block < tokens and start is None:
            start, end = causal_ranges(hidden_states, keys)
        up_key, up_value = self._up_projections(hidden_states)

        def blocks() -> Iterator[Block]:
            for begin in range(0, tokens, block):
                here = slice(begin, begin + block)
                hidden, turn = hidden_states[:, here], _rows_of(rope, here)
                latent = self.query_latent(hidden)
                index = LayerIndex(plan, hidden, turn, key=index_key, query_latent=latent)
                if self.indexer is not None and (not dense or context.observer is not None):
                    index.query, index.weight = self._index_queries(hidden, latent, turn)
                query = self._queries(hidden, latent, turn, up_key)
                first, last = (None, None) if start is None or end is None else (start[:, here], end[:, here])
                yield LayerAttention(query, key, value, first, last, kept, self.scaling, None, None), index

        outputs = []
        for mixed in attend(plan, keys, blocks(), context):
            if packed:
                mixed = without_gradient(mixed, mixed)
            outputs.append(self.o_proj(torch.einsum("bthl,hvl->bthv", mixed, up_value).flatten(2)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _rows(self, hidden_states: torch.Tensor, rope: Rope) -> torch.Tensor:
        """What the cache keeps of these tokens, `[B, T, L + R]`."""
        latent, rotated = self.kv_a_proj_with_mqa(hidden_states).split((self.latent_dim, self.rope_dim), dim=-1)
        rotated = rotate_first(rotated, rope, self.layout.attention_rope)
        return torch.cat((self.kv_a_layernorm(latent), rotated), dim=-1).to(_multiplied_in(hidden_states))

    @staticmethod
    def rope_of(position_embeddings: Angles, context: DSAContext) -> Rope:
        """Tables of these tokens' angles, `[B or 1, T, R]` each, made once for all layers of a forward."""
        made_from = position_embeddings if isinstance(position_embeddings, torch.Tensor) else position_embeddings[0]
        return context.once("rope", made_from, lambda: _tables(position_embeddings))

    def query_latent(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """What queries and index queries are made of, `[B, t, Lq]`; `None` where that is the hidden states."""
        return self.q_a_layernorm(self.q_a_proj(hidden_states)) if self.has_query_latent else None

    def _queries(
        self, hidden_states: torch.Tensor, latent: torch.Tensor | None, rope: Rope, up_key: torch.Tensor
    ) -> torch.Tensor:
        """Queries in the frame of the rows, `[B, t, H, L + R]`."""
        query = self.q_proj(hidden_states) if latent is None else self.q_b_proj(latent)
        query = query.unflatten(-1, (self.heads, -1))
        plain, rotated = query.split((self.nope_dim, self.rope_dim), dim=-1)
        rotated = rotate_first(rotated, _for_heads(rope), self.layout.attention_rope)
        absorbed = torch.einsum("bthn,hnl->bthl", plain, up_key)
        return torch.cat((absorbed, rotated), dim=-1).to(_multiplied_in(hidden_states))

    def _up_projections(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`U_k [H, N, L]` and `U_v [H, V, L]`, views of `kv_b_proj`'s weight where it is a plain linear layer."""
        layer = self.kv_b_proj
        if type(layer) is nn.Linear and not layer.weight.is_meta:
            weight = layer.weight
        else:
            # An adapter, a quantised layer or one on disk: its columns are what it makes of the unit vectors.
            dtype = self.kv_a_layernorm.weight.dtype
            weight = layer(torch.eye(self.latent_dim, dtype=dtype, device=hidden_states.device)).transpose(0, 1)
        heads = weight.unflatten(0, (self.heads, -1))
        return heads[:, : self.nope_dim], heads[:, self.nope_dim :]

    @torch.no_grad()
    def _index_keys(self, hidden_states: torch.Tensor, rope: Rope, stored: LatentLayer | None) -> IndexKeys:
        """Index keys of all cached tokens and these, stored where there is a cache; `[B, S, Di]`."""
        indexer = self.indexer
        key = rotate_first(indexer.k_norm(indexer.wk(hidden_states)), rope, self.layout.index_rope)
        if stored is not None:
            stored.append_index(key)
            return stored.index_keys()
        return stored_form(key, self.plan.config.index_dtype)

    @torch.no_grad()
    def _index_queries(
        self, hidden_states: torch.Tensor, latent: torch.Tensor | None, rope: Rope
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Index queries fp32 `[B, t, Hi, Di]` and head weights fp32 `[B, t, Hi]`."""
        indexer = self.indexer
        query = indexer.wq_b(hidden_states if latent is None else latent)
        query = query.unflatten(-1, (indexer.n_heads, indexer.head_dim))
        query = rotate_first(query, _for_heads(rope), self.layout.index_rope)
        weight = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype)).float()
        return query.float(), weight * indexer.n_heads**-0.5


def rotate_first(x: torch.Tensor, rope: Rope, layout: RopeLayout) -> torch.Tensor:
    """Applies RoPE to the first dims of `x`; neighbouring pairs come out half-split, as transformers has it.

    Args:
        x: `[..., D]`.
        rope: Tables that broadcast against `x`, of as many dims as are turned.
        layout: How `x` pairs them.
    """
    width = rope[0].shape[-1]
    if layout == "interleaved":
        paired = x[..., :width].unflatten(-1, (width // 2, 2)).transpose(-1, -2).flatten(-2)
        x = paired if width == x.shape[-1] else torch.cat((paired, x[..., width:]), dim=-1)
    return rotate_half_split(x, *rope)


def _multiplied_in(hidden_states: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products: under autocast norms and angles come out wider than what they meet."""
    device = hidden_states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype


def _tables(position_embeddings: Angles) -> Rope:
    """Tables `[B or 1, T, R]` out of the model's `cos, sin`, which have the row of angles twice."""
    if isinstance(position_embeddings, torch.Tensor):
        return rope_tables(position_embeddings.real, position_embeddings.imag)
    cos, sin = position_embeddings
    pairs = cos.shape[-1] // 2
    return rope_tables(cos[..., :pairs], sin[..., :pairs])


def _rows_of(rope: Rope, here: slice) -> Rope:
    return rope[0][:, here], rope[1][:, here]


def _for_heads(rope: Rope) -> Rope:
    return rope[0].unsqueeze(2), rope[1].unsqueeze(2)
