"""Indexers on latent attention that was born without: their shape, their place, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV32Config, DynamicCache, PreTrainedModel
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

import dsa
from dsa.models.attached import indexers_of
from dsa.models.attachment import put_on, take_off
from dsa.models.latent import attention as latent_attention
from dsa.models.latent.attention import LatentAttention
from dsa.modules.indexer import LatentIndexer
from dsa.modules.latents import LatentLayer
from dsa.testing.memory import LargestTensor
from dsa.testing.tiny_models import tiny_model, tiny_tokens

SIZES: dict[str, Any] = {"top_k": 12, "index_heads": 4, "index_head_dim": 16}
LATENT = ["axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"]


def logits(model: PreTrainedModel, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **kwargs).logits


@pytest.mark.parametrize("name", LATENT)
def test_the_indexer_has_the_shape_of_deepseek_v32(name: str) -> None:
    model = tiny_model(name)
    dsa.attach(model, **SIZES)
    own = model.config
    theirs = DeepseekV32Indexer(
        DeepseekV32Config(
            hidden_size=own.hidden_size, q_lora_rank=own.q_lora_rank, qk_rope_head_dim=own.qk_rope_head_dim,
            index_n_heads=4, index_head_dim=16, index_topk=12,
        ), 0
    )  # fmt: skip
    ours = indexers_of(model)[0]
    assert isinstance(ours, LatentIndexer)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_without_a_configuration_it_has_the_sizes_of_deepseek_v32() -> None:
    model = tiny_model("deepseek_v3")
    config = dsa.attach(model).config
    assert (config.index_heads, config.index_head_dim, config.top_k) == (64, 128, 2048)
    assert (config.sinks, config.local, config.index_rope_dim, config.index_dtype) == (0, 0, 8, "fp32")


def test_without_a_query_latent_queries_come_from_the_hidden_states() -> None:
    model, tokens = tiny_model("deepseek_v2", q_lora_rank=None), tiny_tokens(1, 30)
    dense = logits(model, tokens)
    dsa.attach(model, **SIZES)
    assert indexers_of(model)[0].wq_b.weight.shape == (64, 32)
    torch.testing.assert_close(logits(model, tokens[:, :12]), dense[:, :12], atol=1e-5, rtol=0)
    assert (logits(model, tokens) - dense).abs().max() > 1e-3


@pytest.mark.parametrize("name", LATENT)
def test_detaching_gives_the_modules_back(name: str) -> None:
    model = tiny_model(name)
    before = [layer.self_attn for layer in model.model.layers]
    dsa.attach(model, **SIZES)
    assert all(isinstance(layer.self_attn, LatentAttention) for layer in model.model.layers)
    model.model.layers[0].self_attn.o_proj = changed = nn.Linear(40, 32, bias=False)
    kept = take_off(model)
    assert [layer.self_attn for layer in model.model.layers] == before
    assert before[0].o_proj is changed
    assert not any("indexer" in key for key in model.state_dict())
    assert put_on(model, kept, top_k=9).config.top_k == 9
    assert torch.equal(indexers_of(model)[1].wq_b.weight, kept.weights[1]["wq_b.weight"])


def test_layers_that_are_dense_or_share() -> None:
    model, tokens = tiny_model("deepseek_v3", num_hidden_layers=4), tiny_tokens(1, 40)
    dsa.attach(model, **SIZES, layers={0: {"dense": True}, 2: {"share": 1}, 3: {"top_k": 9}})
    assert sorted(indexers_of(model)) == [1, 3]
    whole = logits(model, tokens)
    cache, parts = DynamicCache(config=model.config), []
    for begin, end in ((0, 17), (17, 18), (18, 40)):
        parts.append(logits(model, tokens[:, begin:end], past_key_values=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
    assert all(isinstance(layer, LatentLayer) for layer in cache.layers)


def test_16384_tokens_without_keys_and_values_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_attention, "QUERY_BYTES", 1 << 22)
    model = tiny_model("deepseek_v3", num_hidden_layers=1, max_position_embeddings=16384, num_attention_heads=16,
                       num_key_value_heads=16)  # fmt: skip
    dsa.attach(model, top_k=64, index_heads=2, index_head_dim=16)
    with LargestTensor() as largest:
        logits(model, tiny_tokens(1, 16384), logits_to_keep=1)
    # Keys of 16 heads would be 21 MB, a mask of all pairs 268 MB.
    assert largest.bytes < 16 << 20


class TestRefused:
    def test_other_rotated_dims(self) -> None:
        model = tiny_model("deepseek_v3")
        with pytest.raises(ValueError, match=r"index_rope_dim must be 8, the model's qk_rope_head_dim"):
            dsa.attach(model, index_rope_dim=4)
        with pytest.raises(ValueError, match=r"index_head_dim must be at least 8"):
            dsa.attach(model, index_head_dim=4, index_rope_dim=None)
        assert not dsa.is_attached(model)

    def test_latent_attention_of_another_form(self) -> None:
        from transformers import Mistral4Config, Mistral4ForCausalLM

        with torch.device("meta"):
            model = Mistral4ForCausalLM(Mistral4Config(num_hidden_layers=1, n_routed_experts=2, num_experts_per_tok=1))
        with pytest.raises(ValueError, match=r"Mistral4ForCausalLM.*'mistral4': it scales queries by position"):
            dsa.attach(model)

    def test_a_filled_cache(self) -> None:
        model = tiny_model("deepseek_v3")
        cache = model(tiny_tokens(1, 5)).past_key_values
        dsa.attach(model, **SIZES)
        with pytest.raises(ValueError, match="already holds 5 tokens in layer 0"):
            model(tiny_tokens(1, 5), past_key_values=cache)
