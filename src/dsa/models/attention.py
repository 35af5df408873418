"""The attention function of attached models, and the hooks that feed it.

transformers calls `dsa_attention` for every attention layer of an attached model. A layer with an indexer has a
hook in front that computes the index tensors from the hidden states, stores the index keys in the cache and adds
both to the call as the keyword argument `dsa_index`; other layers arrive without it and run dense.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values,
`K` top-k.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

from dsa.config import DSAConfig
from dsa.models.context import AttentionCall, DSAContext
from dsa.models.families import Family
from dsa.models.masks import split_mask, visible_ranges
from dsa.modules.cache import IndexedLayer, IndexKeys, StaticIndexedLayer, indexed_layer
from dsa.modules.indexer import Indexer
from dsa.ops import (
    QuantizedKeys,
    dense_attention,
    index_topk,
    native_support,
    quantize_index_keys,
    sparse_attention,
)
from dsa.ops.index_projection import FEW_TOKENS, Rope, index_projection

IMPLEMENTATION = "dsa"

PLAN = "dsa_plan"
"""Attribute of an attached attention layer that holds its `LayerPlan`."""

WARNED = "dsa_warned_positions"

QUERIES_AT_A_TIME = 4096
"""Queries whose selection is held at once when nobody asked to see it: int32 `[B, 4096, K]`."""


@dataclass(frozen=True)
class LayerPlan:
    """What attaching decided for one full-attention layer."""

    layer: int
    config: DSAConfig
    family: Family
    parameters: tuple[str, ...]
    """Names of the attention module's positional parameters, in order."""

    @cached_property
    def top_k(self) -> int:
        return self.config.layer_top_k(self.layer)

    @cached_property
    def local(self) -> int:
        return self.config.layer_local(self.layer)

    @cached_property
    def dense(self) -> bool:
        return self.config.is_dense(self.layer)

    @cached_property
    def source(self) -> int | None:
        """The layer whose selection this one reuses."""
        return self.config.shared_with(self.layer)

    @cached_property
    def is_shared(self) -> bool:
        """Whether another layer reuses this one's selection."""
        return any(self.config.shared_with(layer) == self.layer for layer in self.config.layers)

    @cached_property
    def is_last_reader(self) -> bool:
        """Whether no later layer reuses the selection that this one reuses."""
        return not any(
            self.config.shared_with(layer) == self.source for layer in self.config.layers if layer > self.layer
        )

    def runs_dense(self, keys: int, context: DSAContext) -> bool:
        """Whether the layer attends to all of its `keys` tokens and needs no selection."""
        if self.dense or context.mode == "dense":
            return True
        return keys <= self.top_k and self.config.dense_shortcut and context.select is None


@dataclass
class LayerIndex:
    """What the hook hands to the attention function of one layer; the tensors only where they will be used."""

    plan: LayerPlan
    hidden_states: torch.Tensor
    rope: Rope | None = None
    query: torch.Tensor | None = None
    key: IndexKeys | None = None
    weight: torch.Tensor | None = None


def dsa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    dsa_index: LayerIndex | None = None,
    dsa_context: DSAContext | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `query [B, H, T, D]`, `key [B, G, S, D]`, `value [B, G, S, Dv]`.

    Returns:
        `[B, T, H, Dv]`, and no weights.

    Raises:
        NotImplementedError: Attention dropout, or a mask that is not ranges of positions.
    """
    if dropout:
        raise NotImplementedError(
            "dsa does not apply attention dropout; set the model's attention dropout to 0 to train it sparse"
        )
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    tokens, keys = query.shape[1], key.shape[1]
    context = dsa_context if dsa_context is not None else DSAContext()
    start, end, kept = context.once("mask", attention_mask, lambda: split_mask(attention_mask, tokens, keys))
    attention = _Attention(query, key, value, start, end, kept, scale, softcap, s_aux)
    if dsa_index is None:
        return attention.dense(), None
    plan = dsa_index.plan
    call = _observed_call(attention, dsa_index) if context.observer or context.select else None
    if plan.runs_dense(keys, context):
        out = attention.dense()
    elif context.select is not None:
        assert call is not None
        call.indices = context.select(call)
        out = attention.sparse(call.indices)
    else:
        out = _sparse_layer(attention, dsa_index, context, call)
    if call is not None and context.observer is not None and dsa_index.query is not None:
        context.observer(call)
    return out, None


def _sparse_layer(
    attention: _Attention, index: LayerIndex, context: DSAContext, call: AttentionCall | None
) -> torch.Tensor:
    """Selects and attends, a block of queries at a time unless the whole selection is wanted."""
    plan, tokens = index.plan, attention.query.shape[1]
    if plan.source is not None:
        out = attention.sparse(context.indices[plan.source])
        if plan.is_last_reader and not torch.is_grad_enabled():
            # With gradients, checkpointing may run this layer again.
            del context.indices[plan.source]
        return out
    if call is not None or plan.is_shared or torch.is_grad_enabled() or tokens <= QUERIES_AT_A_TIME:
        indices = _select(attention, index, index.query, index.weight)
        if plan.is_shared:
            context.indices[plan.layer] = indices
        if call is not None:
            call.indices = indices
        return attention.sparse(indices)
    assert index.query is not None
    assert index.weight is not None
    blocks = []
    for begin in range(0, tokens, QUERIES_AT_A_TIME):
        stop = begin + QUERIES_AT_A_TIME
        rows = attention.rows(begin, stop)
        indices = _select(rows, index, index.query[:, begin:stop], index.weight[:, begin:stop])
        blocks.append(rows.sparse(indices))
    return torch.cat(blocks, dim=1)


def _select(
    attention: _Attention, index: LayerIndex, query: torch.Tensor | None, weight: torch.Tensor | None
) -> torch.Tensor:
    """Selection int32 `[B, T, K]` of the queries of `attention`; positions with padding in them become -1."""
    plan = index.plan
    assert index.key is not None
    assert query is not None
    assert weight is not None
    # The selection has no gradient, and `index_topk` passes none.
    indices = index_topk(
        query,
        _without_holes(index.key, attention.kept),
        weight,
        plan.top_k,
        sinks=plan.config.sinks,
        local=plan.local,
        key_start=attention.start,
        key_end=attention.end,
    )
    if attention.kept is not None:
        flat = indices.clamp(min=0).flatten(1).long()
        seen = attention.kept.gather(1, flat).view_as(indices)
        indices = torch.where(seen, indices, -1)
    return indices


def _without_holes(keys: IndexKeys, kept: torch.Tensor | None) -> IndexKeys:
    """Index keys that rank last (NaN) where `kept` bool `[B, S]` says that nobody may see the token."""
    if kept is None:
        return keys
    if isinstance(keys, QuantizedKeys):
        return QuantizedKeys(keys.data, keys.scale.masked_fill(~kept, torch.nan))
    return keys.masked_fill(~kept[..., None], torch.nan)


@dataclass
class _Attention:
    """One layer's tensors, token-major, and the two ways to attend with them.

    `start` and `end` are int32 `[B, T]`, or both `None` for causal and right-aligned.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    start: torch.Tensor | None
    end: torch.Tensor | None
    kept: torch.Tensor | None
    scale: float
    softcap: float | None
    sink_logits: torch.Tensor | None

    def ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`key_start, key_end` int32 `[B, T]`, the default written out."""
        if self.start is not None and self.end is not None:
            return self.start, self.end
        batch, tokens, keys = self.query.shape[0], self.query.shape[1], self.key.shape[1]
        positions = torch.arange(keys - tokens + 1, keys + 1, dtype=torch.int32, device=self.query.device)
        end = positions.expand(batch, -1)
        return torch.zeros_like(end), end

    def rows(self, begin: int, stop: int) -> _Attention:
        """The same for the queries `begin` to `stop`."""
        start, end = self.ranges()
        return _Attention(
            self.query[:, begin:stop],
            self.key,
            self.value,
            start[:, begin:stop],
            end[:, begin:stop],
            self.kept,
            self.scale,
            self.softcap,
            self.sink_logits,
        )

    def sparse(self, indices: torch.Tensor) -> torch.Tensor:
        out, _ = sparse_attention(
            self.query,
            self.key,
            self.value,
            indices,
            scale=self.scale,
            softcap=self.softcap,
            sink_logits=self.sink_logits,
        )
        return out

    def dense(self) -> torch.Tensor:
        """Through `dense_attention` where it has a compiled kernel; else torch's own kernel where that can.

        torch's can where its upper-left causal mask and ours are the same: one query, or no cache.
        """
        tokens, keys = self.query.shape[1], self.key.shape[1]
        if self.kept is not None:
            return self._dense_with_holes()
        plain = self.start is None and self.softcap is None and self.sink_logits is None
        compiled = native_support.gap(self.query, self.key, self.value) is None
        if plain and tokens in (1, keys) and not compiled:
            out = F.scaled_dot_product_attention(
                self.query.transpose(1, 2),
                self.key.transpose(1, 2),
                self.value.transpose(1, 2),
                is_causal=tokens > 1,
                scale=self.scale,
                enable_gqa=self.query.shape[2] != self.key.shape[2],
            )
            return out.transpose(1, 2).contiguous()
        out, _ = dense_attention(
            self.query,
            self.key,
            self.value,
            scale=self.scale,
            softcap=self.softcap,
            sink_logits=self.sink_logits,
            key_start=self.start,
            key_end=self.end,
        )
        return out

    def _dense_with_holes(self) -> torch.Tensor:
        """Dense attention that leaves out padding between visible tokens: every kept position is listed."""
        assert self.kept is not None
        start, end = self.ranges()
        positions = torch.arange(self.key.shape[1], dtype=torch.int32, device=self.query.device)
        blocks = []
        for begin in range(0, self.query.shape[1], QUERIES_AT_A_TIME // 16):
            stop = begin + QUERIES_AT_A_TIME // 16
            visible = (positions >= start[:, begin:stop, None]) & (positions < end[:, begin:stop, None])
            indices = torch.where(visible & self.kept[:, None], positions, -1)
            blocks.append(self.rows(begin, stop).sparse(indices))
        return torch.cat(blocks, dim=1)


def _observed_call(attention: _Attention, index: LayerIndex) -> AttentionCall:
    start, end = attention.ranges()
    return AttentionCall(
        layer=index.plan.layer,
        query=attention.query,
        key=attention.key,
        value=attention.value,
        hidden_states=index.hidden_states,
        rope=index.rope,
        index_query=index.query,
        index_key=index.key,
        index_weight=index.weight,
        indices=None,
        key_start=start,
        key_end=end,
        scale=attention.scale,
        softcap=attention.softcap,
        sink_logits=attention.sink_logits,
    )


def before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of every attached attention layer: runs its indexer and adds `dsa_index`."""
    plan = cast(LayerPlan, getattr(module, PLAN))

    def argument(name: str) -> Any:
        if name in kwargs:
            return kwargs[name]
        position = plan.parameters.index(name) if name in plan.parameters else len(args)
        return args[position] if position < len(args) else None

    index = LayerIndex(plan, argument("hidden_states"))
    cache = argument(plan.family.cache)
    indexer = cast("Indexer | None", getattr(module, "indexer", None))
    stored = None
    if cache is not None:
        stored = indexed_layer(cache, plan.layer, plan.config.index_dtype if indexer is not None else None)
    if indexer is not None:
        context = kwargs.get("dsa_context") or DSAContext()
        _run_indexer(module, indexer, index, argument("position_embeddings"), stored, context)
    return args, {**kwargs, "dsa_index": index}


def _run_indexer(
    module: nn.Module,
    indexer: Indexer,
    index: LayerIndex,
    angles: Any,
    stored: IndexedLayer | StaticIndexedLayer | None,
    context: DSAContext,
) -> None:
    """Stores the index keys of these tokens and fills `index`; queries and weights only where they will be used."""
    # The indexer learns from its own loss only (arXiv 2512.02556, section 2): nothing flows back into the model.
    plan, hidden_states = index.plan, index.hidden_states.detach()
    if plan.family.applies_rope(module, angles):
        index.rope = context.once("rope", angles[0], lambda: plan.family.rope_of(angles, indexer.rope_dim))
    if isinstance(stored, IndexedLayer) and _index_few_tokens(indexer, index, hidden_states, stored, context):
        return
    key = indexer.keys(hidden_states, index.rope)
    keys = stored.append_index(key.detach()) if stored is not None else key.shape[1]
    if plan.runs_dense(keys, context) and context.observer is None:
        return
    if stored is not None:
        index.key = stored.index_keys()
    else:
        index.key = quantize_index_keys(key.detach()) if plan.config.index_dtype == "int8" else key.float()
    index.query, index.weight = indexer.queries(hidden_states, index.rope)


def _index_few_tokens(
    indexer: Indexer, index: LayerIndex, hidden_states: torch.Tensor, stored: IndexedLayer, context: DSAContext
) -> bool:
    """What `_run_indexer` does, in one kernel; `False`, and nothing done, where that cannot stand in for torch."""
    batch, tokens, _ = hidden_states.shape
    if batch * tokens > FEW_TOKENS or torch.is_grad_enabled() or native_support.gap(hidden_states) is not None:
        return False
    weights = indexer.weights_for(stored.serial)
    if weights is None:
        return False
    storage, begin = stored.index_room((batch, tokens, indexer.head_dim), hidden_states.device)
    wanted = context.observer is not None or not index.plan.runs_dense(begin + tokens, context)
    made = index_projection(hidden_states, weights, index.rope, storage, begin, queries=wanted)
    if made is not None:
        index.key = stored.index_keys()
        index.query, index.weight = made
    return True


def before_decoder(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the decoder: checks that the call can be served and makes its context."""
    if module.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"attn_implementation was changed to {module.config._attn_implementation!r} while dsa is attached, so "
            f"nothing would be sparse; call dsa.detach(model) first, or set it back to {IMPLEMENTATION!r}"
        )
    _check_positions(module, args, kwargs)
    if kwargs.get("dsa_context") is None:
        kwargs = {**kwargs, "dsa_context": DSAContext()}
    return args, kwargs


def _check_positions(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    trained = getattr(decoder.config, "max_position_embeddings", None)
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if trained is None or tokens is None:
        return
    cache = kwargs.get("past_key_values")
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    total = tokens.shape[1] + (int(cache.get_seq_length()) if cache is not None else 0)
    if total <= trained:
        return
    name = type(decoder).__name__
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        raise ValueError(
            f"{total} tokens are more than the {trained} positions that {name} has embeddings for; shorten the prompt"
        )
    if not getattr(decoder, WARNED, False):
        setattr(decoder, WARNED, True)
        warnings.warn(
            f"{total} tokens are more than the {trained} positions that {name} was trained on: positions from "
            f"{trained} on are extrapolated by its RoPE ({rotary.rope_type}), and quality may fall",
            stacklevel=2,
        )


def register() -> None:
    """Makes `attn_implementation="dsa"` known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, dsa_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, visible_ranges)
