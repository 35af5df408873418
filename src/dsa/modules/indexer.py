"""The lightning indexer: a few small heads that score every earlier token (arXiv 2512.02556, eq. 1).

Shapes: `B` batch, `T` tokens, `Hi`/`Di` index heads / index head dim, `Gs` selections of a query, `R` rotated dims,
`Lq` dims of a query latent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dsa.config import DSAConfig
from dsa.ops.index_projection import IndexWeights, Rope, rotate_half_split


class IndexInputs(NamedTuple):
    """What an indexer makes of hidden states: queries `[B, T, Hi, Di]`, keys `[B, T, Di]`, weights `[B, T, Hi]`.

    Of several selections the weights are `[B, T, Gs, Hi]`.

    The weights are fp32 and carry the factor `Hi**-0.5`; the factor `Di**-0.5` belongs to the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    weight: torch.Tensor


class IndexProjection(nn.Module):
    """`x @ weight.T`, initialised as `nn.Linear` is, and not one.

    What goes over every linear layer of a model, as adapters on `"all-linear"` and quantizers do, shall leave the
    indexers alone: they have no part in the model's gradient, and what they select depends on small differences.

    Args:
        inputs: Width of `x`.
        outputs: Width of the result.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        """The widths, as `nn.Linear` prints them."""
        outputs, inputs = self.weight.shape
        return f"inputs={inputs}, outputs={outputs}"


class Indexer(nn.Module):
    """Maps hidden states to index queries, keys and head weights.

    There is one key per token, shared by all index heads, with a LayerNorm (eps 1e-6) before RoPE. RoPE
    turns the first `config.rope_dim` dims in the half-split layout: dim `i` pairs with dim `i + R/2`.

    Args:
        hidden_size: Width of the hidden states.
        config: Gives `index_heads`, `index_head_dim` and `rope_dim`.
        selections: `Gs`; each has head weights of its own, row `i * Hi + j` of `weights_proj` those of head `j`.
    """

    def __init__(self, hidden_size: int, config: DSAConfig, selections: int = 1) -> None:
        super().__init__()
        self.heads = config.index_heads
        self.head_dim = config.index_head_dim
        self.rope_dim = config.rope_dim
        self.selections = selections
        self.wq = IndexProjection(hidden_size, self.heads * self.head_dim)
        self.wk = IndexProjection(hidden_size, self.head_dim)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = IndexProjection(hidden_size, selections * self.heads)
        self._looked: tuple[int, IndexWeights | None] = -1, None

    def forward(self, hidden_states: torch.Tensor, rope: Rope | None = None) -> IndexInputs:
        """Computes the index tensors of some tokens.

        Args:
            hidden_states: `[B, T, hidden_size]`, what the attention layer itself receives.
            rope: Angles for these tokens' positions, or `None` for layers without RoPE.
        """
        query, weight = self.queries(hidden_states, rope)
        return IndexInputs(query, self.keys(hidden_states, rope), weight)

    @property
    def query_projection(self) -> IndexProjection:
        """What makes the index queries, under whatever name a checkpoint has it."""
        return self.wq

    def queries(
        self, hidden_states: torch.Tensor, rope: Rope | None = None, query_latent: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The index queries `[B, T, Hi, Di]` and weights `[B, T, (Gs,) Hi]` alone; arguments as in `forward`.

        Args:
            hidden_states: `[B, T, hidden_size]`.
            rope: Angles for these tokens' positions.
            query_latent: `[B, T, Lq]`, what the queries are made of where that is not the hidden states.
        """
        source = hidden_states if query_latent is None else query_latent
        query = self.query_projection(source).view(*source.shape[:-1], self.heads, self.head_dim)
        if rope is not None and self.rope_dim:
            cos, sin = rope
            query = rotate_half_split(query, cos.unsqueeze(2), sin.unsqueeze(2))
        return query, self.head_weights(hidden_states)

    def head_weights(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The weights fp32 `[B, T, Hi]` alone, `[B, T, Gs, Hi]` of several selections."""
        weight = self.weights_proj(hidden_states).float() * self.heads**-0.5
        return weight if self.selections == 1 else weight.unflatten(-1, (self.selections, self.heads))

    def keys(self, hidden_states: torch.Tensor, rope: Rope | None = None) -> torch.Tensor:
        """The index keys `[B, T, Di]` alone; arguments as in `forward`."""
        key = self.k_norm(self.wk(hidden_states))
        return key if rope is None or not self.rope_dim else rotate_half_split(key, *rope)

    def fill(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Takes stored weights, in place. Head weights of one selection serve each of several.

        Raises:
            RuntimeError: A weight is missing, left over, or has another shape.
        """
        rows = weights.get("weights_proj.weight")
        if rows is not None and len(rows) == self.heads:
            weights = {**weights, "weights_proj.weight": rows.repeat(self.selections, 1)}
        self.load_state_dict(weights)

    def weights_for(self, cache: int) -> IndexWeights | None:
        """`plain_weights()`, looked at once for each cache: looking takes longer than computing a token's key.

        Args:
            cache: Number of the cache layer.
        """
        looked, weights = self._looked
        if looked != cache:
            weights = self.plain_weights()
            self._looked = cache, weights
        return weights

    def plain_weights(self) -> IndexWeights | None:
        """The weights, for `index_projection` to compute with; `None` where that would skip something.

        Such as a hook on one of the projections, or a module that replaces one (an adapter). Of several selections the
        head weights are those of the first.
        """
        query, key, head, norm = self.wq, self.wk, self.weights_proj, self.k_norm
        if type(norm) is not nn.LayerNorm or _is_watched(norm):
            return None
        for projection in (query, key, head):
            if type(projection) is not IndexProjection or _is_watched(projection):
                return None
        of_one = head.weight if self.selections == 1 else head.weight[: self.heads]
        return IndexWeights(query.weight, key.weight, of_one, norm.weight, norm.bias)


class LatentIndexer(Indexer):
    """The indexer of multi-head latent attention, with the names and shapes that DeepSeek-V3.2's has.

    Its queries come from the latent that the attention's own queries come from, where the model has one.

    Args:
        hidden_size: Width of the hidden states.
        config: Gives `index_heads`, `index_head_dim` and `rope_dim`.
        query_latent: `Lq`; `None` for models whose queries come from the hidden states.
    """

    def __init__(self, hidden_size: int, config: DSAConfig, query_latent: int | None) -> None:
        super().__init__(hidden_size, config)
        del self.wq
        self.wq_b = IndexProjection(query_latent or hidden_size, self.heads * self.head_dim)

    @property
    def query_projection(self) -> IndexProjection:
        return self.wq_b

    @property
    def n_heads(self) -> int:
        """`Hi`, under transformers' name."""
        return self.heads

    def plain_weights(self) -> None:
        """`None`: `index_projection` makes queries and keys of one input."""
        return None


def _is_watched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
