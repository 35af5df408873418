"""Caches of FP8 rows and index keys of one byte a number, as `dsa cost` counts them and as they are held."""

import pytest
import torch
from transformers import DynamicCache

import dsa
from dsa.cost import Storage, config_for, decode_work, memory, shape_from
from dsa.cost.presets import PRESETS
from dsa.generation.room import storage_of
from dsa.ops.packed_latents.types import row_bytes
from dsa.testing.born_with_dsa import born_model


@pytest.mark.parametrize(("latent", "rope"), [(512, 64), (20, 8), (129, 2)])
def test_a_row_has_the_bytes_that_the_cache_writes(latent: int, rope: int) -> None:
    fields = {**PRESETS["DeepSeek-V3.2"], "kv_lora_rank": latent, "qk_rope_head_dim": rope}
    shape = shape_from(fields, "it")
    assert Storage(fp8_rows=True).row(shape.layers[0].attention) == row_bytes(latent, rope)


def test_deepseek() -> None:
    """As in the table of docs/born-with-dsa.md: 656 bytes a token and layer, and 132 of an index key."""
    shape = shape_from(PRESETS["DeepSeek-V3.2"], "it")
    config = config_for(shape, shape.trained_dsa, index_dtype="fp8")
    held = memory(shape, config, 131_072, Storage(fp8_rows=True))
    assert (held.keys_and_values, held.index_keys) == (131_072 * 61 * 656, 131_072 * 61 * 132)
    assert memory(shape, config, 131_072).keys_and_values == 131_072 * 61 * 1152
    step = decode_work(shape, config, 131_072, 131_072, Storage(fp8_rows=True))
    assert step["attention"].cache_read == 61 * 2048 * 656
    assert step["attention"].cache_written == 61 * 656
    assert step["index_scan"].cache_read == 61 * 131_072 * 132


def test_keys_and_values_are_no_rows() -> None:
    shape = shape_from(PRESETS["Qwen3-0.6B"], "it")
    assert memory(shape, None, 100, Storage(fp8_rows=True)) == memory(shape, None, 100)


@pytest.mark.parametrize("index_dtype", ["fp32", "int8", "fp8"])
@pytest.mark.parametrize("cache", ["full", "fp8"])
def test_it_is_what_an_accelerated_model_holds(cache: str, index_dtype: str) -> None:
    model = born_model("glm_moe_dsa")
    config = dsa.accelerate(model, cache=cache, index_dtype=index_dtype).config
    held = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(1, 22)[None], past_key_values=held, use_cache=True)
    expected = memory(shape_from(model.config.to_dict(), "it"), config, 21, storage_of(model))
    assert sum(layer._buffers["key"].view().nbytes for layer in held.layers) == expected.keys_and_values
    keys = [layer.index_keys() for layer in held.layers if layer.index_dtype is not None]
    kept = (keys.nbytes if isinstance(keys, torch.Tensor) else keys.data.nbytes + keys.scale.nbytes for keys in keys)
    assert sum(kept) == expected.index_keys
