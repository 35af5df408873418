"""Models born with DSA whose caches keep FP8 rows: what they hold, and how far the results move."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import dsa
from dsa.models.families import BORN_WITH_DSA
from dsa.modules.latents import LatentLayer
from dsa.ops import PackedLatents, QuantizedKeys, pack_latents
from dsa.testing.born_with_dsa import MEDIUM, born_model
from dsa.testing.tiny_models import tiny_tokens


def logits(model: PreTrainedModel, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **kwargs).logits


@pytest.fixture(scope="module", params=BORN_WITH_DSA)
def packed(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = born_model(request.param)
    model.generation_config.eos_token_id = None
    dsa.accelerate(model, cache="fp8")
    return model


def generate(model: PreTrainedModel, prompt: torch.Tensor, **way: Any) -> Any:
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 9, "do_sample": False, **way}
    return model.generate(prompt, eos_token_id=None, **given)


def in_parts(model: PreTrainedModel, tokens: torch.Tensor, sizes: tuple[int, ...], **kwargs: Any) -> torch.Tensor:
    cache, parts, begin = DynamicCache(config=model.config), [], 0
    for size in sizes:
        parts.append(logits(model, tokens[:, begin : begin + size], past_key_values=cache, **kwargs))
        begin += size
    return torch.cat(parts, dim=1)


def test_the_cache_holds_the_rows_of_the_layer(packed: PreTrainedModel) -> None:
    """Of the first layer, whose input is not rounded: the bytes are those that the full cache's numbers give."""
    tokens = tiny_tokens(2, 20)
    plain = born_model(packed.config.model_type)
    dsa.accelerate(plain)
    caches = [DynamicCache(config=packed.config) for _ in range(2)]
    for model, cache in zip((packed, plain), caches):
        logits(model, tokens, past_key_values=cache)
    ours, full = (cache.layers[0] for cache in caches)
    assert isinstance(ours, LatentLayer)
    stored = ours._buffers["key"].view()
    assert stored.dtype == torch.uint8
    expected = pack_latents(full._buffers["key"].view().squeeze(2), packed.config.kv_lora_rank)
    assert torch.equal(stored, expected.data)
    # transformers sees numbers.
    assert torch.equal(ours.keys, expected.unpack()[:, None, :, : packed.config.kv_lora_rank])
    assert torch.equal(ours.values, expected.unpack()[:, None, :, packed.config.kv_lora_rank :])
    assert ours.get_seq_length() == 20


@pytest.mark.parametrize("use_cache", [True, False])
def test_index_keys_in_fp8(use_cache: bool) -> None:
    model = born_model("deepseek_v32")
    dsa.accelerate(model, cache="fp8", index_dtype="fp8")
    kinds: list[str] = []

    def observe(call: dsa.AttentionCall) -> None:
        assert isinstance(call.index_key, QuantizedKeys)
        kinds.append(call.index_key.dtype)

    logits(model, tiny_tokens(2, 20), use_cache=use_cache, dsa_context=dsa.DSAContext(observer=observe))
    assert kinds == ["fp8"] * 3
    assert generate(model, tiny_tokens(1, 20)).shape == (1, 29)


def test_the_bytes_of_deepseeks_sizes() -> None:
    layers = {}
    for kept in ("full", "fp8"):
        layers[kept] = LatentLayer(512, rows_dtype=kept)  # type: ignore[arg-type]
        layers[kept].reserve(1000)
        rows = layers[kept].append_rows(torch.randn(1, 300, 576))
        assert isinstance(rows, PackedLatents) == (kept == "fp8")
    per_token = {name: layer._buffers["key"].storage.nbytes // 1000 for name, layer in layers.items()}
    assert per_token == {"full": 2304, "fp8": 656}


@pytest.mark.parametrize("name", BORN_WITH_DSA)
def test_logits_move_by_the_rounding_of_the_rows(name: str) -> None:
    """Tiny random models of three layers, where no choice of tokens or experts turns over a rounding."""
    model = born_model(name, first_k_dense_replace=3)
    dsa.accelerate(model, cache="fp8", top_k=64, dense_shortcut=False)
    tokens = tiny_tokens(2, 60)
    found, exact = logits(model, tokens, use_cache=True), logits(model, tokens, use_cache=False)
    assert not torch.equal(found, exact)
    error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.median() < 0.05
    assert error.max() < 0.2


def test_attention_moves_by_the_rounding_of_a_row_on_random_weights() -> None:
    """One layer that selects everything, so that nothing but the rounding differs.

    Random rows have nothing in common: averages of them shrink as the errors do. tests/ops has the other case.
    """
    model = born_model("deepseek_v32", **MEDIUM)
    outputs = {}
    for kept in ("full", "fp8"):
        dsa.accelerate(model, cache=kept, top_k=300, dense_shortcut=False)  # type: ignore[arg-type]
        attention = model.model.layers[0].self_attn
        seen: list[torch.Tensor] = []
        hook = attention.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[0]))
        logits(model, tiny_tokens(1, 300), use_cache=True)
        hook.remove()
        outputs[kept] = seen[0][:, 100:]
        dsa.restore(model)
    error = (outputs["fp8"] - outputs["full"]).norm(dim=-1) / outputs["full"].norm(dim=-1)
    assert 1e-2 < error.median() < 3.5e-2


@pytest.mark.parametrize("top_k", [8, 64], ids=["sparse", "short enough to be dense"])
def test_chunks_and_single_tokens(top_k: int) -> None:
    """Every token is read back from the cache, so nothing depends on the chunks but the last bits."""
    model = born_model("deepseek_v32", index_n_heads=32)
    dsa.accelerate(model, cache="fp8", top_k=top_k)
    tokens = tiny_tokens(2, 41)
    expected = logits(model, tokens)
    found = in_parts(model, tokens, (7, 1, 1, 13, 1, 18))
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    # A last bit may turn the rounding of a number to eight bits; then that row differs by one step.
    assert error.median() < 1e-4
    assert error.max() < 0.2


def test_padding_and_observers(packed: PreTrainedModel) -> None:
    tokens = tiny_tokens(2, 30)
    mask = torch.ones_like(tokens)
    mask[1, :11] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    both = logits(packed, tokens, attention_mask=mask, position_ids=positions)
    alone = logits(packed, tokens[1:, 11:])
    error = (both[1:, 11:] - alone).norm(dim=-1) / alone.norm(dim=-1)
    assert error.median() < 1e-4
    shapes: list[torch.Size] = []
    context = dsa.DSAContext(observer=lambda call: shapes.append(call.key.shape))
    seen = logits(packed, tokens[:1], dsa_context=context)
    width = packed.config.kv_lora_rank + packed.config.qk_rope_head_dim
    assert set(shapes) == {torch.Size((1, 30, 1, width))}
    torch.testing.assert_close(seen, logits(packed, tokens[:1]), atol=1e-3, rtol=0)


GENERATION = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("way", GENERATION.values(), ids=GENERATION)
def test_generation(packed: PreTrainedModel, way: dict[str, Any]) -> None:
    prompt = tiny_tokens(1, 29)
    out = generate(packed, prompt, return_dict_in_generate=True, **way)
    assert out.sequences.shape == (1, 38)
    for layer in out.past_key_values.layers:
        assert isinstance(layer, LatentLayer)
        assert layer.rows_dtype == "fp8"
        assert layer.get_seq_length() == 37


def test_the_report_says_what_a_cache_keeps() -> None:
    model = born_model("deepseek_v32", kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=64, num_hidden_layers=1)
    assert "a cache keeps rows of 2,304 bytes (float32)" in str(dsa.accelerate(model))
    dsa.restore(model)
    assert "a cache keeps FP8 rows of 656 bytes (2,304 as float32)" in str(dsa.accelerate(model, cache="fp8"))


class TestRefusals:
    def test_another_name(self) -> None:
        model = born_model("deepseek_v32")
        with pytest.raises(ValueError, match="cache must be one of full, fp8, got 'int4'"):
            dsa.accelerate(model, cache="int4")  # type: ignore[arg-type]
        assert not dsa.is_accelerated(model)

    def test_a_cache_that_was_filled_otherwise(self) -> None:
        model = born_model("deepseek_v32")
        dsa.accelerate(model)
        cache = DynamicCache(config=model.config)
        logits(model, tiny_tokens(1, 5), past_key_values=cache)
        dsa.restore(model)
        dsa.accelerate(model, cache="fp8")
        with pytest.raises(ValueError, match=r"rows of layer 0 as 'full'.*cache='fp8'; start from an empty cache"):
            logits(model, tiny_tokens(1, 5), past_key_values=cache)

    def test_a_static_cache_that_is_full(self) -> None:
        model = born_model("deepseek_v32")
        dsa.accelerate(model, cache="fp8")
        cache = StaticCache(config=model.config, max_cache_len=8)
        with pytest.raises(ValueError, match="room for 8 tokens, and 9 are needed"):
            logits(model, tiny_tokens(1, 9), past_key_values=cache)

    @pytest.mark.parametrize("length", [6, 24], ids=["dense", "sparse"])
    def test_gradients_through_a_cache(self, length: int) -> None:
        model = born_model("deepseek_v32")
        dsa.accelerate(model, cache="fp8")
        tokens = tiny_tokens(1, length)
        with pytest.raises(NotImplementedError, match="use_cache=False"):
            model(tokens, labels=tokens, use_cache=True).loss.backward()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        assert model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.grad is not None
