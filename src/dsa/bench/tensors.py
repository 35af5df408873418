"""The tensors of one attention layer, as random numbers.

Shapes: `n` tokens, `H`/`G` query / KV heads, `D` head dim, `Hi`/`Di` index heads / index head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa.modules import memory
from dsa.ops import QuantizedKeys, quantize_index_keys


@dataclass(frozen=True)
class Sizes:
    """Heads and dims of a layer with an indexer."""

    heads: int
    kv_heads: int
    head_dim: int
    index_heads: int
    index_dim: int
    top_k: int
    sinks: int = 0
    local: int = 0

    def describe(self) -> dict[str, int | str]:
        """For the record."""
        return {**vars(self), "kv_dtype": "fp32", "index_dtype": "int8"}

    def __str__(self) -> str:
        return (
            f"{self.heads}/{self.kv_heads}/{self.head_dim} heads, K = {self.top_k:,}, "
            f"Hi = {self.index_heads}, Di = {self.index_dim}"
        )


DEFAULT_MODEL_SIZES = Sizes(9, 3, 64, 4, 32, top_k=1024, sinks=4, local=256)
"""One layer of the default model with its shipped indexers."""

LARGE_SIZES = Sizes(32, 8, 128, 8, 64, top_k=2048)
"""One layer of a model of 8 billion weights."""


@dataclass(frozen=True)
class LayerTensors:
    """What the attention of one layer reads.

    Args:
        query: `[1, n, H, D]`; `n` may be smaller than the number of keys `S`, as in decoding.
        key: `[1, S, G, D]`.
        value: `[1, S, G, D]`.
        index_query: `[1, n, Hi, Di]`.
        index_key: `[1, S, Di]`, int8, or fp32 for comparisons.
        index_weight: `[1, n, Hi]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    index_query: Tensor
    index_key: QuantizedKeys | Tensor
    index_weight: Tensor

    def prefix(self, tokens: int) -> LayerTensors:
        """The first tokens of a prefill, which is what a shorter text would have given."""
        return LayerTensors(
            self.query[:, :tokens],
            self.key[:, :tokens],
            self.value[:, :tokens],
            self.index_query[:, :tokens],
            self.index_key[:, :tokens],
            self.index_weight[:, :tokens],
        )


def gaussian(sizes: Sizes, keys: int, *, queries: int | None = None, seed: int = 0) -> LayerTensors:
    """Standard normal numbers: neighbouring queries select nothing in common.

    Keys and values lie in memory as the cache of an attached model places them.

    Args:
        sizes: Heads and dims.
        keys: `S`.
        queries: `n`; `None` for as many as keys.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def cached(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, out=memory.empty(shape, torch.float32))

    index_keys = QuantizedKeys(
        memory.empty((1, keys, sizes.index_dim), torch.int8), memory.empty((1, keys), torch.float32)
    )
    tokens = keys if queries is None else queries
    return LayerTensors(
        normal(1, tokens, sizes.heads, sizes.head_dim),
        cached(1, keys, sizes.kv_heads, sizes.head_dim),
        cached(1, keys, sizes.kv_heads, sizes.head_dim),
        normal(1, tokens, sizes.index_heads, sizes.index_dim),
        quantize_index_keys(normal(1, keys, sizes.index_dim), out=index_keys),
        normal(1, tokens, sizes.index_heads) * sizes.index_heads**-0.5,
    )
