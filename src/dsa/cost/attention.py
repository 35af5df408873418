"""What attention costs per query, predicted: tokens read, tokens scanned by indexers, operations and bytes.

Everything is a mean over queries that see between `first` and `last` tokens; for one decoded token at a length `n`
both are `n`, for the prefill of `n` tokens they are 1 and `n`. Projections, MLPs and the language-modelling head cost
the same dense or sparse and are left out.

Letters: `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values, `Hi`/`Di` index heads / index head dim, `K`
top-k, `n` tokens that a query sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsa.config import DSAConfig

LayerKind = Literal["sparse", "shared", "dense"]


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention layer and of its indexer.

    Args:
        heads: `H`.
        kv_heads: `G`.
        key_dim: `D`.
        value_dim: `Dv`.
        index_heads: `Hi`.
        index_head_dim: `Di`.
        kv_bytes: Bytes of one number of K and V in the cache.
        index_bytes: Bytes of one number of an index key; int8 keys also carry an fp32 scale per token.
        selections: Selections of each query, which read parts of the KV heads.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    index_heads: int
    index_head_dim: int
    kv_bytes: int = 4
    index_bytes: int = 1
    selections: int = 1

    @property
    def operations_per_token_read(self) -> int:
        """Scores and weighted sum over all heads: `2 H (D + Dv)`."""
        return 2 * self.heads * (self.key_dim + self.value_dim)

    @property
    def operations_per_token_scanned(self) -> int:
        """The indexer's dot products and their weighted sum for each of `Gs` selections: `2 Hi (Di + Gs)`."""
        return 2 * self.index_heads * (self.index_head_dim + self.selections)

    @property
    def bytes_per_token_read(self) -> int:
        """One token's K and V."""
        return self.kv_bytes * self.kv_heads * (self.key_dim + self.value_dim)

    @property
    def bytes_per_token_scanned(self) -> int:
        """One token's index key, and its scale where it has one."""
        return self.index_bytes * self.index_head_dim + (4 if self.index_bytes == 1 else 0)


@dataclass(frozen=True)
class Cost:
    """What one query costs, in one layer or summed over several.

    Args:
        tokens_read: Tokens whose K and V are read.
        tokens_scanned: Tokens whose index keys are scored.
        operations: Multiplications and additions, the indexers' included.
        bytes: Read from the caches when one query comes alone, as in decoding.
    """

    tokens_read: float
    tokens_scanned: float
    operations: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.tokens_read + other.tokens_read,
            self.tokens_scanned + other.tokens_scanned,
            self.operations + other.operations,
            self.bytes + other.bytes,
        )


NOTHING = Cost(0.0, 0.0, 0.0, 0.0)


def mean_read(first: int, last: int, top_k: int | None = None) -> float:
    """Mean of `min(n, top_k)` over the queries that see `first` to `last` tokens; `None` reads all."""
    count = last - first + 1
    if top_k is None or last <= top_k:
        return (first + last) / 2
    if first >= top_k:
        return float(top_k)
    below = top_k - first + 1
    return (below * (first + top_k) / 2 + (count - below) * top_k) / count


def mean_scanned(first: int, last: int, top_k: int) -> float:
    """Mean number of tokens scored: all that a query sees, none where it sees at most `top_k`."""
    low = max(first, top_k + 1)
    return 0.0 if low > last else (last - low + 1) * (low + last) / 2 / (last - first + 1)


def layer_cost(shape: AttentionShape, kind: LayerKind, first: int, last: int, top_k: int | None = None) -> Cost:
    """What one layer costs per query.

    Args:
        shape: Its sizes.
        kind: `"sparse"` scans and reads `top_k`, `"shared"` reads what another selected, `"dense"` reads all.
        first: Fewest tokens that a query sees, at least 1.
        last: Most tokens that a query sees.
        top_k: `K`; not used by dense layers.

    Raises:
        ValueError: `first` and `last` are not in order, or `top_k` is missing.
    """
    if not 1 <= first <= last:
        raise ValueError(f"first and last must satisfy 1 <= first <= last, got {first} and {last}")
    if kind != "dense" and top_k is None:
        raise ValueError(f"top_k is needed for a layer of kind {kind!r}")
    read = mean_read(first, last, None if kind == "dense" else top_k)
    scanned = mean_scanned(first, last, top_k) if kind == "sparse" and top_k is not None else 0.0
    operations = read * shape.operations_per_token_read + scanned * shape.operations_per_token_scanned
    moved = read * shape.bytes_per_token_read + scanned * shape.bytes_per_token_scanned
    return Cost(read, scanned, operations, moved)


def model_cost(config: DSAConfig | None, shape: AttentionShape, layers: Sequence[int], first: int, last: int) -> Cost:
    """The sum over a model's full-attention layers.

    Args:
        config: What the model is attached with; `None` for the dense model.
        shape: Sizes of a layer, the same in all.
        layers: Numbers of the layers with full attention; sliding-window layers cost the same either way.
        first: Fewest tokens that a query sees.
        last: Most tokens that a query sees.
    """
    total = NOTHING
    for layer in layers:
        kind, top_k = kind_of(config, layer)
        total += layer_cost(shape, kind, first, last, top_k)
    return total


def kind_of(config: DSAConfig | None, layer: int) -> tuple[LayerKind, int | None]:
    """How a full-attention layer runs under a config, and its `K`."""
    if config is None or config.is_dense(layer):
        return "dense", None
    return "sparse" if config.has_indexer(layer) else "shared", config.layer_top_k(layer)
