"""What one forward pass hands from layer to layer, and what an observer sees of it.

One `DSAContext` is made when a forward begins (by the caller, or by the hook on the decoder) and travels as the
keyword argument `dsa_context`. Nothing of a pass is kept in a module, so checkpointing, chunking and concurrent
calls cannot mix passes up.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values,
`Gs` selections of a query, `K` top-k, `Lq` dims of a query latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch

from dsa.ops.index_projection import Rope
from dsa.ops.per_selection import parts_of
from dsa.ops.quantize.types import QuantizedKeys

Result = TypeVar("Result")


@dataclass
class AttentionCall:
    """One attached layer's attention in one forward, as an observer sees it.

    Args:
        layer: Layer number.
        query: `[B, T, H, D]`, RoPE applied.
        key: `[B, S, G, D]`, RoPE applied, cached tokens included.
        value: `[B, S, G, Dv]`.
        hidden_states: `[B, T, hidden_size]`, what the attention layer received: the indexer's input.
        rope: The indexer's angles for these `T` tokens, `None` in layers without RoPE; with `hidden_states`
            a trainer can run the indexer again, with gradients, as often as it updates it.
        index_query: `[B, T, Hi, Di]`; all three are `None` in layers without an indexer, which only
            `select` sees, and an observer of `every_layer`.
        index_key: Index keys of all `S` tokens as the cache stores them: fp32 `[B, S, Di]` or `QuantizedKeys`.
        index_weight: fp32 `[B, T, Hi]`, `[B, T, Gs, Hi]` of several selections.
        indices: int32 `[B, T, K]`, what was selected, `[B, T, Gs, K]` of several selections; `None` where the layer
            ran dense.
        key_start: int32 `[B, T]`, first visible key per query.
        key_end: int32 `[B, T]`, one past the last visible key.
        scale: Factor on `query . key`.
        softcap: `softcap * tanh(scores / softcap)` where the model has it.
        sink_logits: One logit per head in the softmax's denominator where the model has it, `[H]`.
        query_latent: `[B, T, Lq]`, what the index queries are made of where that is not `hidden_states`: models with
            multi-head latent attention. Their `query`, `key` and `value` are those of the absorbed form.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    hidden_states: torch.Tensor
    rope: Rope | None
    index_query: torch.Tensor | None
    index_key: torch.Tensor | QuantizedKeys | None
    index_weight: torch.Tensor | None
    indices: torch.Tensor | None
    key_start: torch.Tensor
    key_end: torch.Tensor
    scale: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
    query_latent: torch.Tensor | None = None

    def by_selection(self, selections: int) -> tuple[AttentionCall, ...]:
        """One call for each of `Gs` selections, with the heads that read it; views. This call where there is one."""
        if selections == 1:
            return (self,)
        heads: dict[str, Any] = {
            name: parts_of(getattr(self, name), 2, selections) for name in ("query", "key", "value")
        }
        if self.sink_logits is not None:
            heads["sink_logits"] = parts_of(self.sink_logits, 0, selections)
        if self.index_weight is not None:
            heads["index_weight"] = self.index_weight.unbind(2)
        if self.indices is not None and self.indices.ndim == 4:
            heads["indices"] = self.indices.unbind(2)
        return tuple(replace(self, **{name: part[i] for name, part in heads.items()}) for i in range(selections))


@dataclass
class DSAContext:
    """State of one forward pass.

    Args:
        mode: `"sparse"` runs as configured. `"dense"` runs full attention in every layer (indexers still
            store their keys), for warm-up and for measuring the dense model.
        observer: Called by every layer that has an indexer, after its attention.
        every_layer: Show the observer the other layers with full attention too: those left dense (`indices` is
            `None`) and those that share another's selection; their index tensors are `None`.
        select: Replaces the indexer's selection: given the call (its `indices` are then `None`), returns the
            indices to attend to. Baselines (window, oracle) are measured through it.
        indices: Selection by layer, for layers that share another's.
        may_run_again: Whether a layer of this pass may run again, as gradient checkpointing does it: selections are
            then kept as long as the context, else until their last reader has run. The hook on the decoder sets it to
            whether gradients are enabled there. Inside a checkpointed layer they may be disabled at first, and the
            layer runs again all the same (`use_reentrant=True`).
    """

    mode: Literal["sparse", "dense"] = "sparse"
    observer: Callable[[AttentionCall], None] | None = None
    every_layer: bool = field(default=False, kw_only=True)
    select: Callable[[AttentionCall], torch.Tensor] | None = None
    indices: dict[int, torch.Tensor] = field(default_factory=dict)
    may_run_again: bool = field(default=True, init=False)
    _last: dict[str, tuple[Any, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, what: str, made_from: Any, make: Callable[[], Result]) -> Result:
        """`make()`, or what it returned to the layer before if that passed the very same object `made_from`.

        Layers are handed one object for all of them: the angles, the mask. What follows from it is computed once.
        """
        last = self._last.get(what)
        if last is not None and last[0] is made_from:
            return last[1]
        result = make()
        self._last[what] = (made_from, result)
        return result
