"""Pairs of a query and a key over one document: what dense attention computes, and what DSA computes.

Counted twice. Without regard to order, each of `n` queries meets all `n` keys, or `K` selected ones: the reduction is
`n / K`. Causally, a query meets only the tokens up to itself, so dense attention has about half the pairs, while DSA
loses only what its first queries lack of `K`: the reduction is about half as large.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pairs:
    """Attention pairs of one head in one layer.

    Args:
        tokens: `n`, the document's length.
        top_k: `K`, tokens each query reads. More than `tokens` leaves nothing out.

    Raises:
        ValueError: Either is below 1.
    """

    tokens: int
    top_k: int

    def __post_init__(self) -> None:
        for name in ("tokens", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def dense(self) -> int:
        """`n^2`."""
        return self.tokens**2

    @property
    def dsa(self) -> int:
        """`n min(n, K)`."""
        return self.tokens * min(self.tokens, self.top_k)

    @property
    def dense_causal(self) -> int:
        """`n (n + 1) / 2`."""
        return self.tokens * (self.tokens + 1) // 2

    @property
    def dsa_causal(self) -> int:
        """Sum over the queries of `min(visible, K)`."""
        full = min(self.tokens, self.top_k)
        return full * (full + 1) // 2 + (self.tokens - full) * full

    @property
    def scanned_causal(self) -> int:
        """Pairs that the indexer scores: all that the queries with more than `K` visible tokens see."""
        full = min(self.tokens, self.top_k)
        return self.dense_causal - full * (full + 1) // 2

    @property
    def reduction(self) -> float:
        """Dense over DSA, without regard to order."""
        return self.dense / self.dsa

    @property
    def reduction_causal(self) -> float:
        """Dense over DSA, counted causally."""
        return self.dense_causal / self.dsa_causal

    def to_json(self) -> dict[str, int | float]:
        """Plain JSON types."""
        return {
            "tokens": self.tokens,
            "top_k": self.top_k,
            "attention_pairs_dense": self.dense,
            "attention_pairs_dsa": self.dsa,
            "pair_reduction": self.reduction,
            "attention_pairs_dense_causal": self.dense_causal,
            "attention_pairs_dsa_causal": self.dsa_causal,
            "pair_reduction_causal": self.reduction_causal,
            "index_pairs_causal": self.scanned_causal,
        }
