"""K and V kept narrower than they are computed: the same in one pass and token by token, for every kind of cache."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import dsa
from dsa.testing.born_with_dsa import born_model
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens

TOKENS = tiny_tokens(1, 60)


def attached(family: str, **changes: Any) -> Any:
    model = tiny_model(family)
    dsa.attach(model, TINY_CONFIG.replace(**changes))
    return model


def logits(model: Any, cache: Any, pieces: tuple[int, ...] = (60,)) -> torch.Tensor:
    with torch.no_grad():
        found = [model(part, past_key_values=cache).logits for part in TOKENS.split(pieces, dim=1)]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_narrower_storage_and_nearly_the_same_logits(family: str, kind: str) -> None:
    wide, narrow = attached(family), attached(family, kv_dtype=kind)
    narrow.load_state_dict(wide.state_dict())
    cache = DynamicCache(config=narrow.config)
    found = logits(narrow, cache)
    expected = logits(wide, DynamicCache(config=wide.config))
    kept = {
        buffer.storage.dtype
        for layer in cache.layers
        for name, buffer in getattr(layer, "buffers", {}).items()
        if name in ("key", "value")
    }
    assert kept == {torch.bfloat16 if kind == "bf16" else torch.float16}
    # Where a selection turns out otherwise, logits differ by more than rounding: the median says what rounding does.
    scale = float(expected.abs().median())
    assert 0 < float((found - expected).abs().median()) < (0.02 if kind == "bf16" else 0.003) * scale
    # What was kept is read, in one pass as token by token.
    stepped = logits(narrow, DynamicCache(config=narrow.config), (40, *[1] * 20))
    assert float((stepped - found).abs().median()) < 1e-4 * scale


def test_a_static_cache() -> None:
    model = attached("llama", kv_dtype="fp16")
    cache = StaticCache(config=model.config, max_cache_len=64)
    found = logits(model, cache, (40, *[1] * 20))
    assert cache.layers[0].keys.dtype == torch.float16
    torch.testing.assert_close(found, logits(model, DynamicCache(config=model.config)), rtol=1e-3, atol=1e-3)


def test_never_wider_than_it_is_computed() -> None:
    model = attached("llama", kv_dtype="fp32").bfloat16()
    cache = DynamicCache(config=model.config)
    logits(model, cache)
    assert cache.layers[0].keys.dtype == torch.bfloat16


def test_latents_of_models_born_with_dsa() -> None:
    model = born_model("deepseek_v32")
    dsa.accelerate(model, kv_dtype="bf16")
    cache = DynamicCache(config=model.config)
    logits(model, cache)
    assert cache.layers[0].rows().dtype == torch.bfloat16
    dsa.restore(model)
    with pytest.raises(ValueError, match="kv_dtype: cache='fp8' keeps rows of bytes"):
        dsa.accelerate(model, cache="fp8", kv_dtype="bf16")


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="kv_dtype must be one of"):
        TINY_CONFIG.replace(kv_dtype="int8")
