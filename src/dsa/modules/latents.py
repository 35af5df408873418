"""The cache layer of multi-head latent attention: one row a token for all heads, and its index keys next to it.

Keys and values of every head are linear maps of the row, so the row is all that is kept: the latent (512 dims in
DeepSeek-V3.2), which is also what the absorbed form of attention takes for values, and after it the shared key dims
that carry RoPE (64). As numbers they take 2,304 bytes a token in fp32 and 1,152 in bf16, as FP8 rows 656.

Shapes: `B` batch, `T` new tokens, `S` cached tokens, `L` latent dims, `R` rotated dims.
"""

from __future__ import annotations

from typing import Any, Literal

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
from dsa.ops import PackedLatents, pack_latents
from dsa.ops.packed_latents.types import row_bytes

CacheDtype = Literal["full", "fp8"]
"""How rows are kept: in the dtype that they come in, or as FP8 rows (`dsa.ops.PackedLatents`)."""

REPLACEABLE = (DynamicLayer, DynamicIndexedLayer, StaticLayer, StaticIndexedLayer)


class LatentLayer(IndexedLayer):
    """Rows `[B, S, L + R]` in one preallocated, token-major storage, and index keys.

    transformers sees what its own layer would hold: `keys` are the latents `[B, 1, S, L]`, `values` the rotated key
    dims `[B, 1, S, R]`: views, or copies decoded from FP8 rows.
    """

    def __init__(
        self,
        latent_dim: int,
        index_dtype: str | None = None,
        limit: int | None = None,
        rows_dtype: CacheDtype = "full",
        rope_dim: int = 0,
        kv_dtype: str | None = None,
    ) -> None:
        """
        Args:
            latent_dim: `L`.
            index_dtype: How index keys are stored, `"int8"`, `"fp8"` or `"fp32"`; `None` for layers without any.
            limit: Most tokens, for a layer that takes the place of a static one.
            rows_dtype: How the rows are kept.
            rope_dim: `R`, for a layer that will `adopt` FP8 rows; others learn it from the first rows.
            kv_dtype: How rows that are kept in full are kept, as in `DSAConfig`.
        """
        super().__init__(index_dtype, kv_dtype)
        self.latent_dim, self.limit, self.rows_dtype = latent_dim, limit, rows_dtype
        self._rope_dim = rope_dim
        del self._buffers["value"]
        if limit is not None:
            self.reserve(limit)

    @property
    def keys(self) -> torch.Tensor | None:
        rows = self._rows_of_one_head()
        return None if rows is None else rows[..., : self.latent_dim]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        assert value is None, "rows are appended, never assigned"

    @property
    def values(self) -> torch.Tensor | None:
        rows = self._rows_of_one_head()
        return None if rows is None else rows[..., self.latent_dim :]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        assert value is None, "rows are appended, never assigned"

    def _rows_of_one_head(self) -> torch.Tensor | None:
        return None if self._buffers["key"].storage is None else self.rows().unsqueeze(1)

    @property
    def rope_dim(self) -> int:
        """`R` of FP8 rows; 0 before the first of them, and of rows that are kept in full."""
        return self._rope_dim

    def _packed(self, data: torch.Tensor) -> PackedLatents:
        return PackedLatents(data, self.latent_dim, self._rope_dim)

    def rows(self) -> torch.Tensor:
        """All rows as numbers, `[B, S, L + R]`: a view, or decoded."""
        data = self._buffers["key"].view()
        return data.squeeze(2) if self.rows_dtype == "full" else self._packed(data).unpack(self.dtype)

    def append_rows(self, rows: torch.Tensor) -> torch.Tensor | PackedLatents:
        """Appends `[B, T, L + R]`; returns all rows, `[B, S, L + R]` or FP8 rows of that shape, as a view.

        Raises:
            ValueError: More tokens than a static cache has room for.
        """
        if not self.is_initialized:
            self.lazy_initialization(rows, rows)
        needed = self.get_seq_length() + rows.shape[1]
        if self.limit is not None and needed > self.limit:
            raise ValueError(f"the static cache has room for {self.limit} tokens, and {needed} are needed")
        buffer = self._buffers["key"]
        if self.rows_dtype == "fp8":
            batch, tokens, width = rows.shape
            self._rope_dim = width - self.latent_dim
            shape = batch, tokens, row_bytes(self.latent_dim, self._rope_dim)
            begin = buffer.make_room(shape, torch.uint8, rows.device, self._reserve)
            assert buffer.storage is not None
            pack_latents(rows, self.latent_dim, out=self._packed(buffer.storage.narrow(1, begin, tokens)))
            return self._packed(buffer.view())
        heads = buffer.append_heads(rows.unsqueeze(1), self._reserve, self.kv_dtype)
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


def latent_layer(
    cache: Cache,
    layer: int,
    latent_dim: int,
    index_dtype: str | None,
    rows_dtype: CacheDtype = "full",
    kv_dtype: str | None = None,
) -> LatentLayer:
    """The cache's layer of that number, exchanged for one of ours at its first use.

    Args:
        cache: The cache that transformers or the user made.
        layer: Layer number.
        latent_dim: `L`.
        index_dtype: Storage of the index keys, or `None` for none.
        rows_dtype: How the rows are kept.
        kv_dtype: How those in full are kept, as in `DSAConfig`.

    Raises:
        ValueError: The layer already holds tokens, or keeps them otherwise, or is of a kind that cannot hold latents.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    while len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    present: Any = cache.layers[layer]
    if isinstance(present, LatentLayer):
        if present.rows_dtype != rows_dtype:
            raise ValueError(
                f"the cache keeps the rows of layer {layer} as {present.rows_dtype!r}, and the model was accelerated "
                f"with cache={rows_dtype!r}; start from an empty cache"
            )
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
    limit = present.max_cache_len if isinstance(present, StaticLayer) else None
    ours = LatentLayer(latent_dim, index_dtype, limit, rows_dtype, kv_dtype=kv_dtype)
    ours.reserve(getattr(cache, RESERVED, 0))
    cache.layers[layer] = ours
    return ours
