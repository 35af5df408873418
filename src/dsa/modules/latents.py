"""The cache layer of multi-head latent attention: one row a token for all heads, and its index keys beside it.

Keys and values of every head are linear maps of the row, so the row is all that is kept: the latent (512 dims in
DeepSeek-V3.2), which is also what the absorbed form of attention takes for values, and behind it the shared key dims
that carry RoPE (64).

Shapes: `B` batch, `T` new tokens, `S` cached tokens, `L` latent dims, `R` rotated dims.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    EncoderDecoderCache,
    StaticIndexedLayer,
    StaticLayer,
)

from dsa.modules.cache import RESERVED, IndexedLayer

REPLACEABLE = (DynamicLayer, DynamicIndexedLayer, StaticLayer, StaticIndexedLayer)


class LatentLayer(IndexedLayer):
    """Rows `[B, S, L + R]` in one preallocated, token-major storage, and index keys.

    transformers sees what its own layer would hold: `keys` are the latents `[B, 1, S, L]`, `values` the rotated key
    dims `[B, 1, S, R]`, both views.
    """

    def __init__(self, latent_dim: int, index_dtype: str | None = None, limit: int | None = None) -> None:
        """
        Args:
            latent_dim: `L`.
            index_dtype: Storage of the index keys, `"int8"` or `"fp32"`; `None` for layers that select nothing.
            limit: Most tokens, for a layer that takes the place of a static one.
        """
        super().__init__(index_dtype)
        self.latent_dim, self.limit = latent_dim, limit
        del self._buffers["value"]
        if limit is not None:
            self.reserve(limit)

    @property
    def keys(self) -> torch.Tensor | None:
        rows = self._heads_first("key")
        return None if rows is None else rows[..., : self.latent_dim]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        assert value is None, "rows are appended, never assigned"

    @property
    def values(self) -> torch.Tensor | None:
        rows = self._heads_first("key")
        return None if rows is None else rows[..., self.latent_dim :]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        assert value is None, "rows are appended, never assigned"

    def rows(self) -> torch.Tensor:
        """All rows, `[B, S, L + R]`, as a view."""
        return self._buffers["key"].view().squeeze(2)

    def append_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Appends `[B, T, L + R]`; returns all rows, `[B, S, L + R]`, as a view.

        Raises:
            ValueError: More tokens than a static cache has room for.
        """
        if not self.is_initialized:
            self.lazy_initialization(rows, rows)
        needed = self.get_seq_length() + rows.shape[1]
        if self.limit is not None and needed > self.limit:
            raise ValueError(f"the static cache has room for {self.limit} tokens, and {needed} are needed")
        buffer = self._buffers["key"]
        heads = buffer.append_heads(rows.unsqueeze(1), self._reserve)
        return heads.squeeze(1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' way in: latents `[B, 1, T, L]` and rotated key dims `[B, 1, T, R]`."""
        self.append_rows(torch.cat((key_states, value_states), dim=-1).squeeze(1))
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_max_length(self) -> int:
        return -1 if self.limit is None else self.limit


def latent_layer(cache: Cache, layer: int, latent_dim: int, index_dtype: str | None) -> LatentLayer:
    """The cache's layer of that number, exchanged for one of ours at its first use.

    Args:
        cache: The cache that transformers or the user made.
        layer: Layer number.
        latent_dim: `L`.
        index_dtype: Storage of the index keys, or `None` for none.

    Raises:
        ValueError: The layer already holds tokens, or is of a kind that cannot hold latents.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    while len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    present: Any = cache.layers[layer]
    if isinstance(present, LatentLayer):
        return present
    if type(present) not in REPLACEABLE:
        raise ValueError(
            f"dsa cannot keep latents in a cache layer of type {type(present).__name__} (layer {layer}); "
            "use the default dynamic cache or a static one"
        )
    if present.is_initialized and int(present.get_seq_length()) > 0:
        raise ValueError(
            f"the cache already holds {int(present.get_seq_length())} tokens in layer {layer}: it was filled before "
            "the model was accelerated; start from an empty cache"
        )
    ours = LatentLayer(latent_dim, index_dtype, present.max_cache_len if isinstance(present, StaticLayer) else None)
    ours.reserve(getattr(cache, RESERVED, 0))
    cache.layers[layer] = ours
    return ours
