"""Models born with DSA compute the same accelerated as through transformers' mask over dense attention."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel

import dsa
from dsa.models.families import BORN_WITH_DSA
from dsa.models.latent import attention as latent_attention
from dsa.models.latent.attention import LatentAttention
from dsa.models.layer import QUERIES_AT_A_TIME
from dsa.modules.cache import reserve
from dsa.modules.latents import LatentLayer
from dsa.testing.born_with_dsa import MEDIUM, born_model
from dsa.testing.memory import LargestTensor
from dsa.testing.tiny_models import tiny_tokens

TOLERANCE = {"atol": 1e-4, "rtol": 0}
SIZES = {"tiny": {}, "medium": MEDIUM}
LENGTH = {"tiny": 41, "medium": 300}

Pair = tuple[PreTrainedModel, PreTrainedModel, int]


@pytest.fixture(scope="module", params=[(name, size) for name in BORN_WITH_DSA for size in SIZES], ids="-".join)
def pair(request: pytest.FixtureRequest) -> Pair:
    """transformers' model, the same accelerated, and a length that is read sparsely."""
    name, size = request.param
    eager = born_model(name, **SIZES[size])
    ours = copy.deepcopy(eager)
    dsa.accelerate(ours)
    return eager, ours, LENGTH[size]


def logits(model: PreTrainedModel, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def test_prefill(pair: Pair) -> None:
    eager, ours, length = pair
    tokens = tiny_tokens(2, length)
    torch.testing.assert_close(logits(ours, tokens), logits(eager, tokens), **TOLERANCE)
    torch.testing.assert_close(
        logits(ours, tokens, use_cache=False), logits(eager, tokens, use_cache=False), **TOLERANCE
    )


def test_queries_in_blocks(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, ours, length = pair
    tokens = tiny_tokens(2, length)
    monkeypatch.setattr(latent_attention, "QUERY_BYTES", 1 << 14)
    torch.testing.assert_close(logits(ours, tokens), logits(eager, tokens), **TOLERANCE)


def test_chunks_and_single_tokens_with_a_cache(pair: Pair) -> None:
    eager, ours, length = pair
    tokens = tiny_tokens(2, length)
    expected = logits(eager, tokens)
    cache, parts, begin = DynamicCache(config=ours.config), [], 0
    for chunk in (7, 1, 1, 13, 1, length - 23):
        parts.append(logits(ours, tokens[:, begin : begin + chunk], past_key_values=cache))
        begin += chunk
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_of_different_lengths(pair: Pair, side: str) -> None:
    eager, ours, length = pair
    tokens = tiny_tokens(3, length)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 5, length // 2)):
        mask[row, slice(0, padding) if side == "left" else slice(length - padding, length)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(ours, tokens, attention_mask=mask, position_ids=positions)
    expected = logits(eager, tokens, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **TOLERANCE)


def test_selections_are_those_of_the_model(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, ours, length = pair
    tokens = tiny_tokens(1, length)
    theirs: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.indexer.register_forward_hook(lambda module, args, out: theirs.append(out))
        for layer in eager.model.layers
        if layer.self_attn.indexer is not None
    ]
    logits(eager, tokens)
    for hook in hooks:
        hook.remove()
    found: list[torch.Tensor] = []

    def observe(call: dsa.AttentionCall) -> None:
        assert call.indices is not None
        found.append(call.indices)

    logits(ours, tokens, dsa_context=dsa.DSAContext(observer=observe))
    assert len(found) == len(theirs)
    full = slice(ours.config.index_topk, None)
    for mine, their in zip(found, theirs):
        assert torch.equal(mine[:, full].sort().values, their[:, full].sort().values)


GENERATION = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 7},
}


@pytest.fixture(scope="module", params=BORN_WITH_DSA)
def writers(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    eager = born_model(request.param)
    eager.generation_config.eos_token_id = None
    ours = copy.deepcopy(eager)
    dsa.accelerate(ours)
    return eager, ours


def generate(model: PreTrainedModel, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    given = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "do_sample": False, **kwargs}
    return model.generate(tokens, **given)


@pytest.mark.parametrize("way", GENERATION.values(), ids=GENERATION)
def test_generation_gives_the_tokens_of_eager(writers: tuple[PreTrainedModel, PreTrainedModel], way: dict) -> None:
    eager, ours = writers
    prompt = tiny_tokens(1, 29)
    assert torch.equal(generate(ours, prompt, **way), generate(eager, prompt, **way))


def test_assisted_generation(writers: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    eager, ours = writers
    prompt = tiny_tokens(1, 29)
    assisted = generate(ours, prompt, assistant_model=copy.deepcopy(ours))
    assert torch.equal(assisted, generate(eager, prompt))


def test_left_padded_generation(writers: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    eager, ours = writers
    prompt = tiny_tokens(2, 29)
    mask = torch.ones_like(prompt)
    mask[1, :11] = 0
    assert torch.equal(generate(ours, prompt, attention_mask=mask), generate(eager, prompt, attention_mask=mask))


def test_more_budget_than_tokens_is_dense() -> None:
    model = born_model("deepseek_v32")
    tokens = tiny_tokens(1, 40)
    dsa.accelerate(model, top_k=64)
    everything = logits(model, tokens)
    dense = logits(model, tokens, dsa_context=dsa.DSAContext(mode="dense"))
    torch.testing.assert_close(everything, dense, atol=1e-6, rtol=0)
    dsa.restore(model)
    dsa.accelerate(model, top_k=40, dense_shortcut=False)
    torch.testing.assert_close(logits(model, tokens), dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BORN_WITH_DSA)
def test_restore_gives_the_modules_back(name: str) -> None:
    model = born_model(name)
    before = [layer.self_attn for layer in model.model.layers]
    names, expected = list(model.state_dict()), logits(model, tiny_tokens(1, 30))
    report = dsa.accelerate(model)
    assert dsa.is_accelerated(model)
    assert all(isinstance(layer.self_attn, LatentAttention) for layer in model.model.layers)
    assert list(model.state_dict()) == names
    assert "replaced by LatentAttention" in str(report)
    dsa.restore(model)
    assert not dsa.is_accelerated(model)
    assert all(layer.self_attn is module for layer, module in zip(model.model.layers, before))
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model, tiny_tokens(1, 30)), expected)


def test_the_cache_holds_latents_and_index_keys_only() -> None:
    model = born_model("glm_moe_dsa", num_hidden_layers=4)
    dsa.accelerate(model)
    cache = DynamicCache(config=model.config)
    reserve(cache, 300)
    logits(model, tiny_tokens(1, 20), past_key_values=cache)
    where = [layer.keys.data_ptr() for layer in cache.layers]
    generate(model, tiny_tokens(1, 40), past_key_values=cache, max_new_tokens=20)
    assert [layer.keys.data_ptr() for layer in cache.layers] == where
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    for layer, cached in enumerate(cache.layers):
        assert isinstance(cached, LatentLayer)
        assert {name: buffer.storage.shape[2:].numel() for name, buffer in cached._buffers.items()} == (
            {"key": width, "index": model.config.index_head_dim} if layer % 2 == 0 else {"key": width}
        )


@pytest.mark.parametrize("index_dtype", ["int8", "fp8"])
def test_quantised_index_keys_select_nearly_the_same(index_dtype: str) -> None:
    model = born_model("deepseek_v32", **MEDIUM)
    chosen: list[torch.Tensor] = []

    def observe(call: dsa.AttentionCall) -> None:
        if call.layer == 0:
            assert call.indices is not None
            chosen.append(call.indices[0, 48:])

    for dtype in ("fp32", index_dtype):
        dsa.accelerate(model, index_dtype=dtype)
        logits(model, tiny_tokens(1, 300), dsa_context=dsa.DSAContext(observer=observe))
        dsa.restore(model)
    exact, rounded = chosen
    common = (exact[:, :, None] == rounded[:, None, :]).any(-1).float().mean()
    assert 0.9 < common < 1


@pytest.mark.parametrize("how", ["prefill", "chunked", "padded", "shared"])
def test_a_long_layer_never_makes_a_mask(how: str) -> None:
    """16,384 tokens: a mask or scores of all pairs would be 1 GB in fp32, a quarter of it as booleans."""
    tokens = 16384
    name = "glm_moe_dsa" if how == "shared" else "deepseek_v32"
    sizes = {"num_hidden_layers": 2 if how == "shared" else 1, "max_position_embeddings": tokens, "index_n_heads": 2}
    model = born_model(name, **sizes)
    dsa.accelerate(model)
    ids = tiny_tokens(1, tokens)
    given: dict[str, Any] = {"use_cache": False}
    if how == "padded":
        given["attention_mask"] = (torch.arange(tokens) >= 100).long()[None]
    with torch.no_grad(), LargestTensor() as largest:
        if how == "chunked":
            cache = DynamicCache(config=model.config)
            for chunk in ids.split(4096, dim=1):
                model(chunk, past_key_values=cache, logits_to_keep=1)
        else:
            model(ids, logits_to_keep=1, **given)
    assert largest.bytes < tokens * tokens // 16


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", BORN_WITH_DSA)
def test_gradients_are_those_of_eager(name: str, checkpointing: bool) -> None:
    """Shared selections too, where checkpointing runs the layers again, last first. Eager's softmax is in fp32."""
    tokens = tiny_tokens(2, 24)
    grads = []
    for accelerated in (False, True):
        model = born_model(name, num_hidden_layers=4).double().train()
        if accelerated:
            dsa.accelerate(model)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for weight, grad in grads[0].items():
        torch.testing.assert_close(grads[1][weight], grad, atol=1e-6, rtol=1e-4, msg=lambda m, w=weight: f"{w}: {m}")


def test_an_adapter_on_the_up_projection_is_honoured() -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    model = born_model("deepseek_v32")
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = Doubled(layer.self_attn.kv_b_proj)
    tokens = tiny_tokens(1, 30)
    expected = logits(model, tokens)
    dsa.accelerate(model)
    torch.testing.assert_close(logits(model, tokens), expected, **TOLERANCE)


def test_two_conversations_do_not_mix() -> None:
    model = born_model("glm_moe_dsa")
    dsa.accelerate(model)
    prompts = tiny_tokens(2, 30)
    expected = [logits(model, prompts[row : row + 1]) for row in range(2)]
    caches, parts = [DynamicCache(config=model.config) for _ in range(2)], [[], []]
    for begin in (0, 15):
        for row in range(2):
            parts[row].append(logits(model, prompts[row : row + 1, begin : begin + 15], past_key_values=caches[row]))
    for row in range(2):
        torch.testing.assert_close(torch.cat(parts[row], dim=1), expected[row], **TOLERANCE)


class TestRefusals:
    def test_a_class_without_a_row(self) -> None:
        sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = MistralForCausalLM(MistralConfig(**sizes, intermediate_size=8, num_key_value_heads=1))
        with pytest.raises(ValueError, match=r"MistralForCausalLM.*no row for 'mistral'.*deepseek_v32.*dsa\.attach"):
            dsa.accelerate(model)
        with pytest.raises(TypeError, match="PreTrainedModel"):
            dsa.accelerate(nn.Linear(2, 2))  # type: ignore[arg-type]

    def test_attach_points_to_accelerate(self) -> None:
        with pytest.raises(ValueError, match=r"indexers of its own.*dsa\.accelerate"):
            dsa.attach(born_model("deepseek_v32"))

    def test_twice_and_not_at_all(self) -> None:
        model = born_model("deepseek_v32")
        with pytest.raises(ValueError, match="is not accelerated"):
            dsa.restore(model)
        dsa.accelerate(model)
        with pytest.raises(ValueError, match="accelerated already"):
            dsa.accelerate(model)

    def test_sizes_that_disagree(self) -> None:
        model = born_model("deepseek_v32")
        model.config.index_n_heads = 8
        with pytest.raises(ValueError, match=r"indexer\.wq_b\.weight is \[256, 24\].*\[128, 24\].*index_n_heads=8"):
            dsa.accelerate(model)
        assert model.config._attn_implementation == "eager"

    def test_missing_and_extra_weights(self) -> None:
        model = born_model("deepseek_v32")
        del model.model.layers[1].self_attn.indexer.wk
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.indexer\.wk\.weight is missing"):
            dsa.accelerate(model)
        model = born_model("deepseek_v32")
        model.model.layers[2].self_attn.indexer.bias = nn.Parameter(torch.zeros(3))
        with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.indexer\.bias"):
            dsa.accelerate(model)
        model = born_model("glm_moe_dsa")
        model.model.layers[1].self_attn.indexer = copy.deepcopy(model.model.layers[0].self_attn.indexer)
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.indexer is there.*'shared'"):
            dsa.accelerate(model)

    def test_a_shared_layer_before_any_full_one(self) -> None:
        model = born_model("glm_moe_dsa", indexer_types=["shared", "full", "shared"])
        with pytest.raises(ValueError, match=r"layer 0 reuse the selection.*must be 'full'"):
            dsa.accelerate(model)

    def test_a_filled_cache_weights_and_another_implementation(self) -> None:
        model = born_model("deepseek_v32")
        cache = model(tiny_tokens(1, 5)).past_key_values
        dsa.accelerate(model)
        with pytest.raises(ValueError, match="already holds 5 tokens in layer 0"):
            model(tiny_tokens(1, 5), past_key_values=cache)
        with pytest.raises(ValueError, match="output_attentions"):
            model(tiny_tokens(1, 5), output_attentions=True)
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match=r"dsa\.restore"):
            model(tiny_tokens(1, 5))


def test_the_long_test_reaches_several_blocks() -> None:
    assert 2 * QUERIES_AT_A_TIME < 16384
