"""What one sparse layer does with its queries: select, attend to the selection, or attend to everything.

The queries come from a hook on a model's own attention (`dsa.models.attention`) or from multi-head latent attention
(`dsa.models.latent`). From here on they are treated alike.

Shapes: `B` batch, `T` query tokens, `t` of them in a block, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head
dims of keys / values, `K` top-k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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
    """The budget of one full-attention layer, or whose selection it reuses."""

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
    """What a layer's indexer made for its queries; the tensors only where they will be used."""

    plan: LayerPlan
    hidden_states: torch.Tensor
    rope: Rope | None = None
    query: torch.Tensor | None = None
    key: IndexKeys | None = None
    weight: torch.Tensor | None = None
    query_latent: torch.Tensor | None = None


Block = tuple["LayerAttention", LayerIndex]
"""Some queries of a layer with all that is needed to serve them."""


def attend(plan: LayerPlan, keys: int, blocks: Iterable[Block], context: DSAContext) -> Iterator[torch.Tensor]:
    """The attention of one layer in one forward: dense, over the context's choice or over the indexer's selection.

    Args:
        plan: Of the layer.
        keys: `S`.
        blocks: The layer's queries in order, `t` of them at a time. A block is taken when the one before it is done.
            Observers and gradients need all queries in one block.
        context: Of the forward. The selection of a layer that others share is kept in it.

    Yields:
        `[B, t, H, Dv]` for each block.
    """
    dense = plan.runs_dense(keys, context)
    source = None if dense or context.select is not None else plan.source
    shared = None if source is None else context.indices[source]
    selections, done = [], 0
    for attention, index in blocks:
        call = _observed_call(attention, index) if context.observer or context.select else None
        if dense:
            out = attention.dense()
        else:
            if context.select is not None:
                assert call is not None
                indices = context.select(call)
            elif shared is not None:
                indices = shared[:, done : done + attention.query.shape[1]]
            else:
                indices = _select(attention, index)
                if plan.is_shared:
                    selections.append(indices)
            if call is not None:
                call.indices = indices
            out = attention.sparse(indices)
        done += attention.query.shape[1]
        if call is not None and context.observer is not None and (index.query is not None or context.every_layer):
            context.observer(call)
        yield out
    if selections:
        context.indices[plan.layer] = selections[0] if len(selections) == 1 else torch.cat(selections, dim=1)
    if source is not None and plan.is_last_reader and not context.may_run_again:
        del context.indices[source]


def blocks_of(attention: LayerAttention, index: LayerIndex, context: DSAContext) -> Iterator[Block]:
    """A layer's queries for `attend`: `QUERIES_AT_A_TIME` of them, or all where the whole selection is wanted."""
    plan, tokens = index.plan, attention.query.shape[1]
    observed = context.observer is not None or context.select is not None
    whole = observed or torch.is_grad_enabled() or plan.is_shared or plan.source is not None
    if whole or tokens <= QUERIES_AT_A_TIME or plan.runs_dense(attention.key.shape[1], context):
        yield attention, index
        return
    assert index.query is not None
    assert index.weight is not None
    for begin in range(0, tokens, QUERIES_AT_A_TIME):
        stop = begin + QUERIES_AT_A_TIME
        # Without an observer nobody looks at the hidden states and angles of a block.
        query, weight = index.query[:, begin:stop], index.weight[:, begin:stop]
        yield attention.rows(begin, stop), replace(index, query=query, weight=weight)


def _select(attention: LayerAttention, index: LayerIndex) -> torch.Tensor:
    """Selection int32 `[B, t, K]` for the queries of one block; positions with padding in them become -1."""
    plan = index.plan
    assert index.query is not None
    assert index.key is not None
    assert index.weight is not None
    # The selection has no gradient, and `index_topk` passes none.
    indices = index_topk(
        index.query,
        _without_holes(index.key, attention.kept),
        index.weight,
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
        return causal_ranges(self.query, self.key.shape[1])

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
        plain = plain and self.query.dtype == self.key.dtype
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


def causal_ranges(tokens: torch.Tensor, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`key_start, key_end` int32 `[B, T]` of `tokens` `[B, T, ...]`, the last `T` of `keys`, each seeing all before."""
    batch, count = tokens.shape[:2]
    end = torch.arange(keys - count + 1, keys + 1, dtype=torch.int32, device=tokens.device).expand(batch, -1)
    return torch.zeros_like(end), end


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
