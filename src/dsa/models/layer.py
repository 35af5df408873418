"""What one attached layer does with its queries: select, attend to the selection, or attend to everything.

Where the queries come from differs, from a hook on a model's own attention (`dsa.models.attention`) or from multi-head
latent attention (`dsa.models.latent`); from here on they are treated alike.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values,
`K` top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from dsa.config import DSAConfig
from dsa.models.context import AttentionCall, DSAContext
from dsa.modules.cache import IndexKeys
from dsa.ops import PackedLatents, QuantizedKeys, dense_attention, index_topk, native_support, sparse_attention
from dsa.ops.index_projection import Rope

QUERIES_AT_A_TIME = 4096
"""Queries whose selection is held at once when nobody asked to see it: int32 `[B, 4096, K]`."""


@dataclass(frozen=True)
class LayerPlan:
    """What attaching decided for one full-attention layer."""

    layer: int
    config: DSAConfig

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
    query_latent: torch.Tensor | None = None


def attend(attention: LayerAttention, index: LayerIndex, context: DSAContext) -> torch.Tensor:
    """The attention of one layer in one forward: dense, over the context's choice or over the indexer's selection.

    Returns:
        `[B, T, H, Dv]`.
    """
    plan = index.plan
    call = _observed_call(attention, index) if context.observer or context.select else None
    if plan.runs_dense(attention.key.shape[1], context):
        out = attention.dense()
    elif context.select is not None:
        assert call is not None
        call.indices = context.select(call)
        out = attention.sparse(call.indices)
    else:
        out = _sparse_layer(attention, index, context, call)
    if call is not None and context.observer is not None and (index.query is not None or context.every_layer):
        context.observer(call)
    return out


def _sparse_layer(
    attention: LayerAttention, index: LayerIndex, context: DSAContext, call: AttentionCall | None
) -> torch.Tensor:
    """Selects and attends, a block of queries at a time unless the whole selection is wanted."""
    plan, tokens = index.plan, attention.query.shape[1]
    if plan.source is not None:
        out = attention.sparse(context.indices[plan.source])
        if call is not None:
            call.indices = context.indices[plan.source]
        if plan.is_last_reader and not torch.is_grad_enabled():
            # With gradients, checkpointing may run this layer again.
            del context.indices[plan.source]
        return out
    if call is not None or plan.is_shared or torch.is_grad_enabled() or tokens <= QUERIES_AT_A_TIME:
        indices = select(attention, index, index.query, index.weight)
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
        indices = select(rows, index, index.query[:, begin:stop], index.weight[:, begin:stop])
        blocks.append(rows.sparse(indices))
    return torch.cat(blocks, dim=1)


def select(
    attention: LayerAttention, index: LayerIndex, query: torch.Tensor | None, weight: torch.Tensor | None
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
class LayerAttention:
    """One layer's tensors, token-major, and the two ways to attend with them.

    `key` may be FP8 rows of latent attention, and `value` is then `None`. `start` and `end` are int32 `[B, T]`, or both
    `None` for causal and right-aligned.
    """

    query: torch.Tensor
    key: torch.Tensor | PackedLatents
    value: torch.Tensor | None
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

    def rows(self, begin: int, stop: int) -> LayerAttention:
        """The same for the queries `begin` to `stop`."""
        start, end = self.ranges()
        return LayerAttention(
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
        if self.kept is not None or isinstance(self.key, PackedLatents):
            return self._dense_by_list()
        assert self.value is not None
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

    def _dense_by_list(self) -> torch.Tensor:
        """Dense attention over FP8 rows, or that leaves out padding between tokens: every kept position is listed."""
        start, end = self.ranges()
        positions = torch.arange(self.key.shape[1], dtype=torch.int32, device=self.query.device)
        blocks = []
        for begin in range(0, self.query.shape[1], QUERIES_AT_A_TIME // 16):
            stop = begin + QUERIES_AT_A_TIME // 16
            visible = (positions >= start[:, begin:stop, None]) & (positions < end[:, begin:stop, None])
            if self.kept is not None:
                visible &= self.kept[:, None]
            indices = torch.where(visible, positions, -1)
            blocks.append(self.rows(begin, stop).sparse(indices))
        return torch.cat(blocks, dim=1)


def _observed_call(attention: LayerAttention, index: LayerIndex) -> AttentionCall:
    start, end = attention.ranges()
    assert isinstance(attention.key, torch.Tensor)
    assert attention.value is not None
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
        query_latent=index.query_latent,
    )
