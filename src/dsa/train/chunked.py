"""The frozen model's forward over long sequences: attention and MLP a chunk of tokens at a time.

At 131,072 tokens the queries of one Llama-8B layer are 1 GB in bf16, and rotating them makes three more of that size.
Here a layer keeps its keys and values (0.5 GB) and works through its tokens in chunks; the queries that an update
learns from are made again from the hidden states, by the model's own attention module.

Shapes: `B` sequences, `S` tokens, `Q` queries of one update, `H`/`G` query / KV heads, `D` head dim.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from dsa.models.attention import PLAN, HookedPlan, before_attention
from dsa.models.context import AttentionCall, DSAContext
from dsa.models.families import family_of
from dsa.models.latent.attention import LatentAttention
from dsa.models.layer import LayerIndex
from dsa.modules.cache import IndexedLayer, reserve
from dsa.modules.latents import LatentLayer

ALONG_TOKENS = {"position_embeddings": 1, "position_ids": -1, "cache_position": 0}
"""Which dim of an attention layer's arguments counts tokens."""

Observer = Callable[[AttentionCall, Callable[[torch.Tensor], torch.Tensor]], None]
"""Called with what a layer computed, and with what makes queries `[B, Q, H, D]` of some positions `[B, Q]`. The
query and the value of the call itself are empty."""


@contextmanager
def chunked(model: PreTrainedModel, size: int, observer: Observer) -> Iterator[None]:
    """While the context is open, layers of sequences longer than `size` read with full attention in chunks.

    Args:
        model: An attached model, called without a cache and with a context in dense mode that has no observer.
        size: Tokens of a chunk.
        observer: Called by every layer that has an indexer, after its attention.
    """
    replaced: list[nn.Module] = []

    def replace(module: nn.Module, make: Callable[[Any], Any]) -> None:
        assert "forward" not in vars(module), "somebody else replaced this forward"
        module.forward = make(module.forward)
        replaced.append(module)

    try:
        for attention in family_of(model).attention_layers(model):
            if hasattr(attention, PLAN) or isinstance(attention, LatentAttention):
                replace(attention, partial(_chunked_attention, attention, size, observer))
        for module in list(model.modules()):
            mlp = getattr(module, "mlp", None)
            if isinstance(mlp, nn.Module) and mlp not in replaced:
                replace(mlp, partial(_chunked_mlp, size))
        yield
    finally:
        for module in replaced:
            del module.forward


def _chunked_mlp(size: int, own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Only what maps token by token and returns no more than that is taken apart.
        if args or kwargs or hidden.ndim != 3 or hidden.shape[1] <= size:
            return own(hidden, *args, **kwargs)
        first = own(hidden[:, :size])
        if not isinstance(first, torch.Tensor) or first.shape[:2] != (hidden.shape[0], size):
            return own(hidden)
        out = first.new_empty(*hidden.shape[:2], *first.shape[2:])
        out[:, :size] = first
        for begin in range(size, hidden.shape[1], size):
            out[:, begin : begin + size] = own(hidden[:, begin : begin + size])
        return out

    return forward


def _chunked_attention(module: nn.Module, size: int, observer: Observer, own: Callable[..., Any]) -> Callable[..., Any]:
    latent = module if isinstance(module, LatentAttention) else None
    plan = cast(HookedPlan, getattr(module, PLAN)) if latent is None else latent.plan
    cached_as = plan.cache if isinstance(plan, HookedPlan) else "past_key_values"
    signature = inspect.signature(own)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(*args, **kwargs)
        given = {name: value for name, value in bound.arguments.items() if name != "kwargs"}
        given |= bound.arguments.get("kwargs", {})
        context = cast(DSAContext, given.pop("dsa_context"))
        hidden = given.pop("hidden_states")
        if latent is None:
            index = cast(LayerIndex, given.pop("dsa_index"))
        else:
            index = LayerIndex(plan, hidden, latent.rope_of(given["position_embeddings"], context))
        assert context.mode == "dense"
        assert context.observer is None
        mask = given.pop("attention_mask", None)
        if mask is not None and mask.dtype != torch.int32:
            raise NotImplementedError("dsa: padding between visible tokens cannot be read in chunks")
        given = {name: value for name, value in given.items() if name != cached_as}
        cache = DynamicCache()
        reserve(cache, hidden.shape[1])

        def run(part: torch.Tensor, arguments: dict[str, Any], masked: Any, **more: Any) -> Any:
            ready = {"hidden_states": part, "attention_mask": masked, **arguments, **more}
            if latent is None:
                _, ready = before_attention(module, (), ready)
            return own(**ready)

        out, weights = None, None
        for begin in range(0, hidden.shape[1], size):
            rows = slice(begin, min(begin + size, hidden.shape[1]))
            part, *rest = run(
                hidden[:, rows],
                _along_tokens(given, lambda each, dim: each.narrow(dim, rows.start, rows.stop - rows.start)),  # noqa: B023
                None if mask is None else mask[:, :, rows],
                dsa_context=DSAContext(mode="dense"),
                **{cached_as: cache},
            )
            out = part.new_empty(*hidden.shape[:2], *part.shape[2:]) if out is None else out
            out[:, rows] = part
            weights = rest
        assert out is not None
        if plan.config.has_indexer(plan.layer):

            def query_of(positions: torch.Tensor) -> torch.Tensor:
                return _probe(run, hidden, given, positions).query

            first = torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)
            if latent is not None and latent.has_query_latent:
                index.query_latent = torch.cat([_of(latent.query_latent(each)) for each in hidden.split(size, 1)], 1)
            key = _keys_of(cache.layers[plan.layer])
            # The values have done their work.
            cache.layers.clear()
            observer(_call(index, key, mask, _probe(run, hidden, given, first)), query_of)
        return (out, *(weights or ()))

    return forward


def _keys_of(layer: Any) -> torch.Tensor:
    """What a cache layer of ours holds of all tokens, as attention takes it: `[B, S, G, D]`."""
    if isinstance(layer, LatentLayer):
        return layer.rows().unsqueeze(2)
    return _of(cast(IndexedLayer, layer).keys).transpose(1, 2)


def _of(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


def _along_tokens(given: dict[str, Any], take: Callable[[torch.Tensor, int], torch.Tensor]) -> dict[str, Any]:
    """The arguments of an attention layer for some of its tokens."""

    def of(value: Any, dim: int) -> Any:
        if isinstance(value, torch.Tensor):
            return take(value, dim % value.ndim)
        if isinstance(value, (tuple, list)):
            return type(value)(of(each, dim) for each in value)
        return value

    return {name: of(value, ALONG_TOKENS[name]) if name in ALONG_TOKENS else value for name, value in given.items()}


def _probe(
    run: Callable[..., Any], hidden: torch.Tensor, given: dict[str, Any], positions: torch.Tensor
) -> AttentionCall:
    """What the module hands to attention for the tokens at `positions` `[B or fewer, Q]`; they attend to nothing."""
    seen: list[AttentionCall] = []

    def attend_to_nothing(call: AttentionCall) -> torch.Tensor:
        seen.append(call)
        return torch.full((*call.query.shape[:2], 1), -1, dtype=torch.int32, device=call.query.device)

    sequences = torch.arange(len(positions), device=positions.device)[:, None]

    def take(each: torch.Tensor, dim: int) -> torch.Tensor:
        if each.ndim == 1:
            return each[positions[0]]
        # Positions may be of the first sequences only.
        return (each.expand(len(positions), *each.shape[1:]) if len(each) == 1 else each)[sequences, positions]

    context = DSAContext(select=attend_to_nothing)
    run(hidden[sequences, positions], _along_tokens(given, take), None, dsa_context=context)
    return seen[0]


def _call(index: LayerIndex, key: torch.Tensor, mask: torch.Tensor | None, probe: AttentionCall) -> AttentionCall:
    """What an observer sees: as `probe`, but of all tokens, and without queries and values."""
    hidden = index.hidden_states
    batch, tokens = hidden.shape[:2]
    if mask is None:
        ends = torch.arange(1, tokens + 1, dtype=torch.int32, device=hidden.device).expand(batch, -1)
        starts = torch.zeros_like(ends)
    else:
        starts, ends = mask[:, 0, :, 0], mask[:, 0, :, 1]
    return dataclasses.replace(
        probe,
        query=probe.query[:, :0],
        key=key,
        value=probe.value[:, :0],
        hidden_states=hidden,
        rope=index.rope,
        index_query=None,
        index_key=None,
        index_weight=None,
        indices=None,
        key_start=starts,
        key_end=ends,
        query_latent=index.query_latent,
    )
