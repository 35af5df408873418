"""The lightning indexer: a few small heads that score every earlier token (arXiv 2512.02556, eq. 1).

Shapes: `B` batch, `T` tokens, `Hi`/`Di` index heads / index head dim, `R` rotated dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from dsa.config import DSAConfig

Rope = tuple[torch.Tensor, torch.Tensor]
"""`cos, sin`, each `[B or 1, T, R]`, ready to be multiplied with: dims `i` and `i + R/2` are the pair that one angle
turns, and the sines of the first half are negated. `rope_tables` makes them out of angles."""


class IndexInputs(NamedTuple):
    """What an indexer makes of hidden states: queries `[B, T, Hi, Di]`, keys `[B, T, Di]`, weights `[B, T, Hi]`.

    The weights are fp32 and carry the factor `Hi**-0.5`; the factor `Di**-0.5` belongs to the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    weight: torch.Tensor


class Indexer(nn.Module):
    """Maps hidden states to index queries, keys and head weights.

    There is one key per token, shared by all index heads, with a LayerNorm (eps 1e-6) before RoPE. RoPE
    turns the first `config.rope_dim` dims in the half-split layout: dim `i` pairs with dim `i + R/2`.

    Args:
        hidden_size: Width of the hidden states.
        config: Gives `index_heads`, `index_head_dim` and `rope_dim`.
    """

    def __init__(self, hidden_size: int, config: DSAConfig) -> None:
        super().__init__()
        self.heads = config.index_heads
        self.head_dim = config.index_head_dim
        self.rope_dim = config.rope_dim
        self.wq = nn.Linear(hidden_size, self.heads * self.head_dim, bias=False)
        self.wk = nn.Linear(hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(hidden_size, self.heads, bias=False)

    def forward(self, hidden_states: torch.Tensor, rope: Rope | None = None) -> IndexInputs:
        """Computes the index tensors of some tokens.

        Args:
            hidden_states: `[B, T, hidden_size]`, what the attention layer itself receives.
            rope: Angles for these tokens' positions, or `None` for layers without RoPE.
        """
        query, weight = self.queries(hidden_states, rope)
        return IndexInputs(query, self.keys(hidden_states, rope), weight)

    def queries(self, hidden_states: torch.Tensor, rope: Rope | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The index queries `[B, T, Hi, Di]` and weights `[B, T, Hi]` alone; arguments as in `forward`."""
        query = self.wq(hidden_states).view(*hidden_states.shape[:-1], self.heads, self.head_dim)
        if rope is not None and self.rope_dim:
            cos, sin = rope
            query = rotate_half_split(query, cos.unsqueeze(2), sin.unsqueeze(2))
        return query, self.weights_proj(hidden_states).float() * self.heads**-0.5

    def keys(self, hidden_states: torch.Tensor, rope: Rope | None = None) -> torch.Tensor:
        """The index keys `[B, T, Di]` alone; arguments as in `forward`."""
        key = self.k_norm(self.wk(hidden_states))
        return key if rope is None or not self.rope_dim else rotate_half_split(key, *rope)


def rope_tables(cos: torch.Tensor, sin: torch.Tensor) -> Rope:
    """`Rope` out of the cosines and sines `[B or 1, T, R/2]` of one angle per pair."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_half_split(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies RoPE, as `Rope` has it, to the first `cos.shape[-1]` dims of `x`."""
    width = cos.shape[-1]
    rotated = x if width == x.shape[-1] else x[..., :width]
    turned = rotated * cos.to(x.dtype) + rotated.roll(width // 2, -1) * sin.to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)
