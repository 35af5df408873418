"""The attention function of attached models, and the hooks that feed it.

transformers calls `dsa_attention` for every attention layer of an attached model. A layer with an indexer has a
pre-hook that computes the index tensors from the hidden states, stores the index keys in the cache and adds
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
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

from dsa.models.context import DSAContext
from dsa.models.families import IMPLEMENTATION, Family
from dsa.models.layer import LayerAttention, LayerIndex, LayerPlan, attend, blocks_of
from dsa.models.masks import split_mask, visible_ranges
from dsa.modules.cache import IndexedLayer, StaticIndexedLayer, indexed_layer, stored_form
from dsa.modules.indexer import Indexer
from dsa.ops import native_support
from dsa.ops.index_projection import FEW_TOKENS, index_projection

PLAN = "dsa_plan"
"""Attribute of an attached attention layer that holds its `LayerPlan`."""

WARNED = "dsa_warned_positions"


@dataclass(frozen=True)
class HookedPlan(LayerPlan):
    """The plan of a layer whose index tensors come from a hook."""

    family: Family
    parameters: tuple[str, ...]
    """Names of the attention module's positional parameters, in order."""

    @cached_property
    def cache(self) -> str:
        """Keyword under which the attention module receives the cache."""
        return next((name for name in ("layer_past", "past_key_value") if name in self.parameters), "past_key_values")


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
        ValueError: Nothing is attached to the model.
    """
    if dropout:
        raise NotImplementedError(
            "dsa does not apply attention dropout; set the model's attention dropout to 0 to train it sparse"
        )
    if dsa_index is None and dsa_context is None:
        raise ValueError(
            f"{type(module).__name__} has attn_implementation={IMPLEMENTATION!r}, but nothing is attached to it. "
            "A model that was saved attached keeps its indexers when AutoModelForCausalLM or AutoModel loads it after "
            "`import dsa`; attach to any other with dsa.attach(model)"
        )
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    tokens, keys = query.shape[1], key.shape[1]
    context = dsa_context if dsa_context is not None else DSAContext()
    start, end, kept = context.once("mask", attention_mask, lambda: split_mask(attention_mask, tokens, keys))
    attention = LayerAttention(query, key, value, start, end, kept, scale, softcap, s_aux)
    if dsa_index is None:
        return attention.dense(), None
    blocks = list(attend(dsa_index.plan, keys, blocks_of(attention, dsa_index, context), context))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1), None


def before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of every attached attention layer: runs its indexer and adds `dsa_index`."""
    plan = cast(HookedPlan, getattr(module, PLAN))

    def argument(name: str) -> Any:
        if name in kwargs:
            return kwargs[name]
        position = plan.parameters.index(name) if name in plan.parameters else len(args)
        return args[position] if position < len(args) else None

    index = LayerIndex(plan, argument("hidden_states"))
    cache = argument(plan.cache)
    indexer = cast("Indexer | None", getattr(module, "indexer", None))
    stored = None
    if cache is not None:
        index_dtype = plan.config.index_dtype if indexer is not None else None
        stored = indexed_layer(cache, plan.layer, index_dtype, plan.config.kv_dtype)
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
    plan, hidden_states = cast(HookedPlan, index.plan), index.hidden_states.detach()
    if plan.family.applies_rope(module, angles):
        made_from = angles if isinstance(angles, torch.Tensor) else angles[0]
        index.rope = context.once("rope", made_from, lambda: plan.family.rope_of(angles, indexer.rope_dim))
    if isinstance(stored, IndexedLayer) and _index_few_tokens(indexer, index, hidden_states, stored, context):
        return
    key = indexer.keys(hidden_states, index.rope)
    keys = stored.append_index(key.detach()) if stored is not None else key.shape[1]
    if plan.runs_dense(keys, context) and context.observer is None:
        return
    if stored is not None:
        index.key = stored.index_keys()
    else:
        index.key = stored_form(key.detach(), plan.config.index_dtype)
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
        if indexer.selections > 1:
            index.weight = indexer.head_weights(hidden_states)
    return True


def before_decoder(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], *, undo: str) -> Any:
    """Forward pre-hook of the decoder: checks that the call can be served and makes its context.

    Args:
        module: The decoder.
        args: Of its forward.
        kwargs: Of its forward.
        undo: The function that makes the model dense again, for messages.
    """
    if module.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"attn_implementation was changed to {module.config._attn_implementation!r} while dsa runs the model, so "
            f"nothing would be sparse; call {undo}(model) first, or set it back to {IMPLEMENTATION!r}"
        )
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise ValueError(
            f"output_attentions: sparse attention keeps no weights; call {undo}(model) first, or watch the layers "
            "with DSAContext(observer=...)"
        )
    _check_positions(module, args, kwargs)
    context = kwargs.get("dsa_context")
    if context is None:
        context = DSAContext()
    context.may_run_again = torch.is_grad_enabled()
    return args, {**kwargs, "dsa_context": context}


def _check_positions(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses more tokens than a model has position embeddings for; warns once of positions that RoPE extrapolates."""
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
