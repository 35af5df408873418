"""The lightning indexer: a few small heads that score every earlier token (arXiv 2512.02556, eq. 1).

Shapes: `B` batch, `T` tokens, `Hi`/`Di` index heads / index head dim, `R` rotated dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from dsa.config import DSAConfig

Rope = tuple[torch.Tensor, torch.Tensor]
"""`cos, sin`, each `[B or 1, T, R/2]`: one angle per rotated pair."""


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
        batch, tokens, _ = hidden_states.shape
        query = self.wq(hidden_states).view(batch, tokens, self.heads, self.head_dim)
        if rope is not None and self.rope_dim:
            query = rotate_half_split(query, *(angle.unsqueeze(2) for angle in rope))
        weight = self.weights_proj(hidden_states).float() * self.heads**-0.5
        return IndexInputs(query, self.keys(hidden_states, rope), weight)

    def keys(self, hidden_states: torch.Tensor, rope: Rope | None = None) -> torch.Tensor:
        """The index keys `[B, T, Di]` alone; arguments as in `forward`."""
        key = self.k_norm(self.wk(hidden_states))
        return key if rope is None or not self.rope_dim else rotate_half_split(key, *rope)


def rotate_half_split(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies RoPE to the first `2 * cos.shape[-1]` dims of `x`, pairing dim `i` with dim `i + R/2`."""
    pairs = cos.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
