"""The cache: appended to without copying, and everything transformers does to a layer done to all its parts."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from dsa.modules.cache import IndexedLayer, StaticIndexedLayer, indexed_layer, reserve
from dsa.ops import QuantizedKeys, quantize_index_keys
from dsa.testing.tiny_models import tiny_model

B, G, D, DI = 2, 3, 4, 8


def states(tokens: int, batch: int = B) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(batch, G, tokens, D),
        torch.randn(batch, G, tokens, D + 1),
        torch.randn(batch, tokens, DI),
    )


def filled(dtype: str = "fp32", sizes: tuple[int, ...] = (5, 1, 1, 300)) -> tuple[IndexedLayer, list[torch.Tensor]]:
    layer, parts = IndexedLayer(dtype), []
    for size in sizes:
        key, value, index = states(size)
        layer.append_index(index)
        layer.update(key, value)
        parts.append((key, value, index))
    return layer, [torch.cat(column, dim=dim) for column, dim in zip(zip(*parts), (2, 2, 1))]


def test_holds_what_was_appended() -> None:
    layer, (key, value, index) = filled()
    assert torch.equal(layer.keys, key)
    assert torch.equal(layer.values, value)
    assert torch.equal(layer.index_keys(), index)
    assert layer.get_seq_length() == 307


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_quantised_keys_do_not_depend_on_how_they_came(dtype: str) -> None:
    torch.manual_seed(0)
    whole, (_, _, index) = filled(dtype)
    at_once = IndexedLayer(dtype)
    assert at_once.append_index(index) == index.shape[1]
    keys = at_once.index_keys()
    assert isinstance(keys, QuantizedKeys)
    assert keys.dtype == dtype
    assert torch.equal(whole.index_keys().data.view(torch.uint8), keys.data.view(torch.uint8))
    assert torch.equal(whole.index_keys().scale, keys.scale)
    whole.batch_repeat_interleave(2)
    whole.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(whole.index_keys().data[1].view(torch.uint8), keys.data[0].view(torch.uint8))


def test_appending_moves_nothing_after_reserve() -> None:
    cache = DynamicCache()
    layer = indexed_layer(cache, 0, "int8")
    reserve(cache, 1000)
    key, value, index = states(10)
    layer.append_index(index)
    layer.update(key, value)
    where = layer.keys.data_ptr(), layer.values.data_ptr(), layer.index_keys().data.data_ptr()
    for _ in range(99):
        key, value, index = states(10)
        layer.append_index(index)
        layer.update(key, value)
    assert layer.get_seq_length() == 1000
    assert (layer.keys.data_ptr(), layer.values.data_ptr(), layer.index_keys().data.data_ptr()) == where


def test_growth_is_amortised() -> None:
    layer, moves, last = IndexedLayer(), 0, None
    for _ in range(5000):
        key, value, _ = states(1, batch=1)
        layer.update(key, value)
        moves += layer.keys.data_ptr() != last
        last = layer.keys.data_ptr()
    assert moves <= 6


def test_one_token_is_one_contiguous_read() -> None:
    layer, _ = filled()
    assert layer.keys[0, :, 7].is_contiguous()


def test_crop_reorder_repeat_and_select() -> None:
    layer, (key, value, index) = filled()
    layer.crop(-4)
    layer.crop(0)
    key, value, index = key[:, :, :-4], value[:, :, :-4], index[:, :-4]
    assert torch.equal(layer.keys, key)
    order = torch.tensor([1, 1])
    layer.reorder_cache(order)
    assert torch.equal(layer.values, value[order])
    assert torch.equal(layer.index_keys(), index[order])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.keys, key[order].repeat_interleave(2, dim=0))
    layer.batch_select_indices(torch.tensor([3]))
    assert torch.equal(layer.index_keys(), index[order][1:])
    layer.reset()
    assert layer.get_seq_length() == 0
    with pytest.raises(ValueError, match="negated"):
        layer.crop(3)


def test_index_keys_must_keep_step_with_keys() -> None:
    layer = IndexedLayer("fp32")
    key, value, index = states(3)
    layer.update(key, value)
    with pytest.raises(ValueError, match="filled before dsa was attached"):
        layer.append_index(index)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_static_layer_writes_in_place(dtype: str) -> None:
    cache = StaticCache(tiny_model("llama").config, max_cache_len=12)
    layer = indexed_layer(cache, 1, dtype)
    assert isinstance(layer, StaticIndexedLayer)
    parts = []
    for size in (5, 1):
        key, value, index = states(size)
        layer.append_index(index)
        layer.update(key, value)
        parts.append(key)
    expected = quantize_index_keys(index, dtype)
    assert torch.equal(layer.index_keys()[:, 5:6].data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(layer.index_keys()[:, 5:6].scale, expected.scale)
    assert layer.keys.shape == (B, G, 12, D)
    assert torch.equal(layer.keys[:, :, :6], torch.cat(parts, dim=2))
    assert int(layer.get_seq_length()) == 6
    assert indexed_layer(cache, 1, dtype) is layer


def test_refuses_what_it_cannot_take_over() -> None:
    cache = DynamicCache()
    key, value, _ = states(3)
    cache.update(key, value, 0)
    with pytest.raises(ValueError, match="start from an empty cache"):
        indexed_layer(cache, 0, "int8")
    cache.layers[0] = DynamicSlidingWindowLayer(4)
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        indexed_layer(cache, 0, "int8")
