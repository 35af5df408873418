"""Cache layers that keep K, V and index keys together: preallocated, token-major, appended to without copying.

transformers' own `DynamicLayer` concatenates, which copies the whole cache for every decoded token. Here a token
is written once into storage that doubles when it is full (or never, after `reserve`), and transformers is handed
views in the layout it expects.

Shapes: `B` batch, `S` cached tokens, `C` capacity, `G` KV heads, `D` head dim, `Di` index head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from dsa.modules import memory
from dsa.ops import quantize_index_keys
from dsa.ops.quantize.types import QuantizedKeys

INITIAL_CAPACITY = 256

RESERVED = "dsa_reserved"
"""Attribute of a cache: the tokens that `reserve` asked room for."""

IndexKeys = torch.Tensor | QuantizedKeys

_QUANTIZED: dict[str | None, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""How index keys of eight bits are stored, by `index_dtype`; they have one fp32 scale per token."""

_KEPT: dict[str | None, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""How K and V are kept, by `kv_dtype`."""

_SERIALS = itertools.count()
"""Numbers of the cache layers made in this process."""


def stored_form(index_keys: torch.Tensor, index_dtype: str) -> IndexKeys:
    """Index keys `[B, S, Di]` as a cache of that dtype stores them."""
    if index_dtype not in _QUANTIZED:
        return index_keys.float()
    return quantize_index_keys(index_keys, "fp8" if index_dtype == "fp8" else "int8")


def kept_dtype(computed: torch.dtype, kv_dtype: str | None) -> torch.dtype:
    """The dtype of K and V in a cache of that `kv_dtype`: never wider than they are computed in."""
    asked = _KEPT.get(kv_dtype, computed)
    return asked if asked.itemsize <= computed.itemsize else computed


class TokenBuffer:
    """A growing `[B, S, ...]` tensor: tokens are written in place, and it moves what is there only when it doubles."""

    def __init__(self) -> None:
        self.storage: torch.Tensor | None = None
        self.length = 0
        self._transposed: tuple[torch.Tensor, torch.Tensor] | None = None
        """The storage and a view of it, `[B, G, C, D]`: two operations less for each token."""

    def view(self) -> torch.Tensor:
        """`[B, S, ...]`, a view of the storage."""
        assert self.storage is not None
        return self.storage.narrow(1, 0, self.length)

    def make_room(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, reserve: int = 0) -> int:
        """Room for tokens after those there, to be written to `storage`; the capacity is at least `reserve`.

        Args:
            shape: `[B, T, ...]` of the new tokens.
            dtype: Of the storage, where this is the first use.
            device: Of the storage, where this is the first use.
            reserve: Tokens to make room for.

        Returns:
            The place of the first of them.
        """
        begin = self.length
        self.length = needed = begin + shape[1]
        if self.storage is None:
            capacity = max(needed, reserve, INITIAL_CAPACITY)
            self.storage = memory.empty((shape[0], capacity, *shape[2:]), dtype, device)
        elif needed > self.storage.shape[1]:
            capacity = max(needed, reserve, 2 * self.storage.shape[1])
            full = self.storage
            grown = memory.empty((full.shape[0], capacity, *full.shape[2:]), full.dtype, full.device)
            grown.narrow(1, 0, begin).copy_(full.narrow(1, 0, begin))
            self.storage = grown
        return begin

    def append_heads(self, states: torch.Tensor, reserve: int = 0, kv_dtype: str | None = None) -> torch.Tensor:
        """Writes `[B, G, T, D]` after what is there; returns all tokens, `[B, G, S, D]`, as a view of what is kept."""
        batch, heads, tokens, dim = states.shape
        dtype = kept_dtype(states.dtype, kv_dtype)
        begin = self.make_room((batch, tokens, heads, dim), dtype, states.device, reserve)
        assert self.storage is not None
        if self._transposed is None or self._transposed[0] is not self.storage:
            self._transposed = self.storage, self.storage.transpose(1, 2)
        view = self._transposed[1]
        view.narrow(2, begin, tokens).copy_(states)
        return view.narrow(2, 0, self.length)

    def replace(self, storage: torch.Tensor) -> None:
        """Takes over storage that was moved, or whose batch was reordered, repeated or selected."""
        self.storage, self._transposed = storage, None


class IndexedLayer(DynamicLayer):
    """K, V and index keys of one attention layer, for attached models.

    `keys` and `values` are views `[B, G, S, D]` of token-major storage. Index keys are stored as int8 or e4m3
    with one fp32 scale per token, or as fp32, whichever `index_dtype` says. Everything that transformers does to a
    `DynamicLayer` (beam reordering, cropping, batch repetition and selection) is done to all of them together.
    """

    def __init__(self, index_dtype: str | None = None, kv_dtype: str | None = None) -> None:
        """
        Args:
            index_dtype: How index keys are kept; `None` for layers that need only the copy-free storage.
            kv_dtype: How K and V are kept, as in `DSAConfig`.
        """
        self.index_dtype, self.kv_dtype = index_dtype, kv_dtype
        self._buffers = {"key": TokenBuffer(), "value": TokenBuffer()}
        if index_dtype is not None:
            self._buffers["index"] = TokenBuffer()
        if index_dtype in _QUANTIZED:
            self._buffers["index_scale"] = TokenBuffer()
        self._reserve = 0
        self.serial = next(_SERIALS)
        self._quantized: QuantizedKeys | None = None
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        return self._heads_first("key")

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        assert value is None, "K is appended to, never assigned"

    @property
    def values(self) -> torch.Tensor | None:
        return self._heads_first("value")

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        assert value is None, "V is appended to, never assigned"

    def _heads_first(self, name: str) -> torch.Tensor | None:
        buffer = self._buffers[name]
        return None if buffer.storage is None else buffer.view().transpose(1, 2)

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` tokens in all, so that appending up to there never moves what is stored."""
        self._reserve = max(self._reserve, tokens)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `[B, G, T, D]` keys and values; returns all of them as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key, value = self._buffers["key"], self._buffers["value"]
        return (
            key.append_heads(key_states, self._reserve, self.kv_dtype),
            value.append_heads(value_states, self._reserve, self.kv_dtype),
        )

    def append_index(self, index_keys: torch.Tensor) -> int:
        """Appends index keys `[B, T, Di]`, before `update` appends the same tokens.

        Returns:
            `S`, how many `index_keys()` are now.

        Raises:
            ValueError: The cache holds tokens that were read without an indexer.
        """
        tokens = index_keys.shape[1]
        storage, begin = self.index_room(index_keys.shape, index_keys.device)
        if isinstance(storage, QuantizedKeys):
            quantize_index_keys(index_keys, storage.dtype, out=storage[:, begin : begin + tokens])
        else:
            storage.narrow(1, begin, tokens).copy_(index_keys)
        return begin + tokens

    def index_room(self, shape: tuple[int, ...], device: torch.device) -> tuple[IndexKeys, int]:
        """Room for index keys `[B, T, Di]`, to be written before `update` appends the same tokens.

        Returns:
            The storage `[B, C, Di]`, and the place of the first of these tokens there.

        Raises:
            ValueError: The cache holds tokens that were read without an indexer.
        """
        index = self._buffers["index"]
        if index.length != self.get_seq_length():
            raise ValueError(
                f"the cache holds {self.get_seq_length()} tokens but index keys of only {index.length}: it was "
                "filled before dsa was attached; start from an empty cache"
            )
        if self.index_dtype not in _QUANTIZED:
            begin = index.make_room(shape, torch.float32, device, self._reserve)
            assert index.storage is not None
            return index.storage, begin
        scale = self._buffers["index_scale"]
        begin = index.make_room(shape, _QUANTIZED[self.index_dtype], device, self._reserve)
        scale.make_room(shape[:2], torch.float32, device, self._reserve)
        storage = self._quantized
        if storage is None or storage.data is not index.storage or storage.scale is not scale.storage:
            assert index.storage is not None
            assert scale.storage is not None
            self._quantized = storage = QuantizedKeys(index.storage, scale.storage)
        return storage, begin

    def index_keys(self) -> IndexKeys:
        """The index keys of all cached tokens, `[B, S, Di]`, as views of what is stored."""
        data = self._buffers["index"].view()
        if self.index_dtype in _QUANTIZED:
            return QuantizedKeys(data, self._buffers["index_scale"].view())
        return data

    @property
    def buffers(self) -> Mapping[str, TokenBuffer]:
        """What is kept of every token: `key`, `value`, and with an indexer `index`, and `index_scale` of eight bits."""
        return self._buffers

    def adopt(self, storages: Mapping[str, torch.Tensor], tokens: int, dtype: torch.dtype) -> None:
        """Takes over storage that was filled elsewhere.

        Args:
            storages: `[B, C, ...]` by name, one for each of `buffers`.
            tokens: How many of the `C` tokens are in it.
            dtype: Of the states that will be appended.
        """
        assert storages.keys() == self._buffers.keys()
        for name, storage in storages.items():
            self._buffers[name].replace(storage)
            self._buffers[name].length = tokens
        self._quantized = None
        self.dtype, self.device, self.is_initialized = dtype, storages["key"].device, True

    def get_seq_length(self) -> int:
        return self._buffers["key"].length

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens (zero or negative, as transformers gives it)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negated number of tokens to remove, got {tokens_to_remove}")
        kept = max(0, self.get_seq_length() + tokens_to_remove)
        for buffer in self._buffers.values():
            buffer.length = min(buffer.length, kept)

    def reset(self) -> None:
        for buffer in self._buffers.values():
            buffer.storage, buffer.length = None, 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for buffer in self._filled():
            buffer.replace(buffer.storage.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for buffer in self._filled():
            buffer.replace(buffer.storage[indices.to(buffer.storage.device)])

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        for buffer in self._filled():
            buffer.replace(buffer.storage.to(device, non_blocking=True))
        self._quantized = None

    def _filled(self) -> list[Any]:
        return [buffer for buffer in self._buffers.values() if buffer.storage is not None]


class StaticIndexedLayer(StaticLayer):
    """The fixed-size counterpart of `IndexedLayer`; `keys` and `values` are `[B, G, C, D]` views."""

    is_compileable = False

    def __init__(self, max_cache_len: int, index_dtype: str | None = None, kv_dtype: str | None = None) -> None:
        super().__init__(max_cache_len)
        self.index_dtype, self.kv_dtype = index_dtype, kv_dtype
        self.index_data: torch.Tensor | None = None
        self.index_scale: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        rows = (self.batch_size, self.max_cache_len, self.num_heads)
        self.keys = memory.empty((*rows, self.k_head_dim), self.dtype, self.device).zero_().transpose(1, 2)
        self.values = memory.empty((*rows, self.v_head_dim), self.dtype, self.device).zero_().transpose(1, 2)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = kept_dtype(key_states.dtype, self.kv_dtype)
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)

    def append_index(self, index_keys: torch.Tensor) -> int:
        """Writes index keys `[B, T, Di]` after those there, before `update`; returns `C`, as many as there are."""
        batch, tokens, dim = index_keys.shape
        if self.index_data is None:
            dtype = _QUANTIZED.get(self.index_dtype, torch.float32)
            self.index_data = memory.empty((batch, self.max_cache_len, dim), dtype, index_keys.device).zero_()
            self.index_scale = index_keys.new_ones((batch, self.max_cache_len), dtype=torch.float32)
        assert self.index_scale is not None
        positions = torch.arange(tokens, device=index_keys.device) + self.cumulative_length.to(index_keys.device)
        stored = stored_form(index_keys, self.index_dtype or "fp32")
        if isinstance(stored, QuantizedKeys):
            # As bytes, because not every operation takes e4m3.
            self.index_data.view(torch.int8).index_copy_(1, positions, stored.data.view(torch.int8))
            self.index_scale.index_copy_(1, positions, stored.scale)
        else:
            self.index_data.index_copy_(1, positions, stored)
        return self.max_cache_len

    def index_keys(self) -> IndexKeys:
        """The index keys `[B, C, Di]`, as stored."""
        assert self.index_data is not None
        assert self.index_scale is not None
        return QuantizedKeys(self.index_data, self.index_scale) if self.index_dtype in _QUANTIZED else self.index_data

    def reset(self) -> None:
        super().reset()
        self.index_data = self.index_scale = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.index_data is not None and self.index_scale is not None:
            self.index_data = self.index_data[beam_idx.to(self.index_data.device)]
            self.index_scale = self.index_scale[beam_idx.to(self.index_scale.device)]


def indexed_layer(
    cache: Cache, layer: int, index_dtype: str | None, kv_dtype: str | None = None
) -> IndexedLayer | StaticIndexedLayer:
    """The cache's layer of that number, exchanged for one of ours at its first use.

    Args:
        cache: The cache that transformers or the user made.
        layer: Layer number.
        index_dtype: Storage of the index keys, or `None` for none.
        kv_dtype: Storage of K and V, as in `DSAConfig`.

    Raises:
        ValueError: The layer already holds tokens without index keys, or is of a kind that cannot hold them.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    while len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    present = cache.layers[layer]
    if isinstance(present, IndexedLayer | StaticIndexedLayer):
        return present
    if type(present) not in (DynamicLayer, StaticLayer) or not isinstance(present, DynamicLayer | StaticLayer):
        raise ValueError(
            f"dsa cannot keep index keys in a cache layer of type {type(present).__name__} (layer {layer}); "
            "use the default dynamic cache or a static one"
        )
    if present.is_initialized and int(present.get_seq_length()) > 0:
        raise ValueError(
            f"the cache already holds {int(present.get_seq_length())} tokens in layer {layer} without index keys: "
            "it was filled before dsa was attached, or by prefix tuning, whose keys and values come from no text and "
            "have no index keys; start from an empty cache, or train a prompt or LoRA adapters instead"
        )
    ours = (
        StaticIndexedLayer(present.max_cache_len, index_dtype, kv_dtype)
        if isinstance(present, StaticLayer)
        else IndexedLayer(index_dtype, kv_dtype)
    )
    if isinstance(ours, IndexedLayer):
        ours.reserve(getattr(cache, RESERVED, 0))
    cache.layers[layer] = ours
    return ours


def reserve(cache: Cache, tokens: int) -> None:
    """Makes room in a cache for `tokens` tokens in all, so that appending up to there copies nothing.

    That holds for layers that will be exchanged for ours later, too; sliding-window layers are left as they are.
    """
    setattr(cache, RESERVED, max(tokens, getattr(cache, RESERVED, 0)))
    for layer in cache.layers:
        if isinstance(layer, IndexedLayer):
            layer.reserve(tokens)
