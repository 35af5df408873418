"""What attach accepts, refuses and reports."""

import logging

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import dsa
from dsa import DSAConfig, LayerConfig
from dsa.models.attached import indexers_of
from dsa.models.attachment import put_on, take_off
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_model("llama", num_hidden_layers=4).double()


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        dsa.attach(torch.nn.Linear(2, 2))


def test_unknown_architecture_is_named() -> None:
    bloom = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(ValueError, match=r"BloomForCausalLM: dsa does not attach to 'bloom': it adds a bias.*ALiBi"):
        dsa.attach(bloom)


def test_encoders_are_refused() -> None:
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(ValueError, match=r"BertModel: dsa does not attach to 'bert': an encoder"):
        dsa.attach(bert)
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50))
    with pytest.raises(ValueError, match="encoder-decoder"):
        dsa.attach(t5)


def test_attention_patched_by_another_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def forward(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        raise AssertionError

    forward.__module__ = "faster_kernels.llama"
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", forward)
    with pytest.raises(ValueError, match=r"layer 0 of LlamaForCausalLM .* patched by faster_kernels.llama"):
        dsa.attach(model)


def test_all_sliding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"MistralForCausalLM has nothing to select: .* they are sliding window"):
        dsa.attach(tiny_model("mistral", sliding_window=16))


def test_attaching_twice_and_detaching_nothing(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="not attached"):
        dsa.detach(model)
    dsa.attach(model, TINY_CONFIG)
    with pytest.raises(ValueError, match=r"attached already; call dsa\.detach"):
        dsa.attach(model, TINY_CONFIG)


def test_implementation_changed_behind_its_back(model: torch.nn.Module) -> None:
    dsa.attach(model, TINY_CONFIG)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"changed to 'sdpa'.*dsa\.detach"):
        model(tiny_tokens(1, 20))
    dsa.detach(model)
    model(tiny_tokens(1, 20))


def test_layer_that_does_not_exist(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="names layer 9, but LlamaForCausalLM has layers 0 to 3"):
        dsa.attach(model, TINY_CONFIG, layers={9: {"dense": True}})
    assert not dsa.is_attached(model)
    dsa.attach(model, TINY_CONFIG)


def test_sliding_layer_cannot_be_configured() -> None:
    with pytest.raises(ValueError, match=r"which stays as it is \(sliding window\)"):
        dsa.attach(tiny_model("gemma2"), TINY_CONFIG, layers={0: {"top_k": 9}})


def test_untrained_indexers_are_said_out_loud(model: torch.nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dsa"):
        dsa.attach(model, TINY_CONFIG)
    assert "untrained" in caplog.text


def test_exceptions_by_layer(model: torch.nn.Module) -> None:
    layers = {0: LayerConfig(dense=True), 2: LayerConfig(share=1), 3: LayerConfig(top_k=12, local=5)}
    report = dsa.attach(model, TINY_CONFIG.replace(layers=layers))
    assert sorted(indexers_of(model)) == [1, 3]
    assert str(report).splitlines()[1:] == [
        "  layer 0: dense, as configured",
        "  layer 1: sparse, reads 8 tokens per query, the last 2 always",
        "  layer 2: sparse, reads what layer 1 selected",
        "  layer 3: sparse, reads 12 tokens per query, the last 5 always",
    ]
    seen = {}
    context = dsa.DSAContext(observer=lambda call: seen.__setitem__(call.layer, call.indices))
    tokens = tiny_tokens(1, 40)
    with torch.no_grad():
        model(tokens, dsa_context=context)
        whole = model(tokens, use_cache=False).logits
        cache = model(tokens[:, :30]).past_key_values
        rest = model(tokens[:, 30:], past_key_values=cache).logits
    assert {layer: indices.shape[-1] for layer, indices in seen.items()} == {1: 8, 3: 12}
    torch.testing.assert_close(rest, whole[:, 30:], atol=1e-9, rtol=0)


def test_shared_layers_attend_to_the_same_tokens(model: torch.nn.Module) -> None:
    """A layer that shares gives what it would give with the indexer of the layer it shares with."""
    dsa.attach(model, TINY_CONFIG, layers={2: {"share": 1}, 0: {"dense": True}, 3: {"dense": True}})
    picked = []

    def select(call: dsa.AttentionCall) -> torch.Tensor:
        picked.append(call.layer)
        return selection

    recorded = {}
    tokens = tiny_tokens(1, 30)
    with torch.no_grad():
        shared = model(tokens, dsa_context=dsa.DSAContext(observer=lambda c: recorded.update({c.layer: c.indices})))
        selection = recorded[1]
        forced = model(tokens, dsa_context=dsa.DSAContext(select=select))
    assert picked == [1, 2]
    assert torch.equal(shared.logits, forced.logits)


def test_a_shared_selection_is_kept_no_longer_than_it_is_read(model: torch.nn.Module) -> None:
    dsa.attach(model, TINY_CONFIG, layers={1: {"share": 0}, 2: {"share": 0}})
    context, tokens = dsa.DSAContext(), tiny_tokens(1, 30)
    held = []
    model.model.layers[1].register_forward_hook(lambda *_: held.append(sorted(context.indices)))
    model.model.layers[2].register_forward_hook(lambda *_: held.append(sorted(context.indices)))
    with torch.no_grad():
        model(tokens, dsa_context=context)
    assert held == [[0], []]
    model(tokens, dsa_context=context)
    assert sorted(context.indices) == [0]


def test_context_modes(model: torch.nn.Module) -> None:
    tokens = tiny_tokens(1, 30)
    with torch.no_grad():
        dense = model(tokens).logits
        dsa.attach(model, TINY_CONFIG)
        sparse = model(tokens).logits
        forced = model(tokens, dsa_context=dsa.DSAContext(mode="dense")).logits
    assert torch.equal(forced, dense)
    assert not torch.equal(sparse, dense)


def test_observer_sees_what_the_layer_used(model: torch.nn.Module) -> None:
    dsa.attach(model, TINY_CONFIG)
    calls = []
    with torch.no_grad():
        model(tiny_tokens(2, 30), dsa_context=dsa.DSAContext(observer=calls.append))
    assert [call.layer for call in calls] == [0, 1, 2, 3]
    call = calls[1]
    assert call.query.shape == (2, 30, 4, 8)
    assert call.key.shape == (2, 30, 2, 8)
    assert call.index_query.shape == (2, 30, 2, 8)
    assert call.index_key.shape == (2, 30, 8)
    assert call.indices.shape == (2, 30, 8)
    assert call.key_end[0].tolist() == list(range(1, 31))
    again = indexers_of(model)[1](call.hidden_states, call.rope)
    assert torch.equal(again.query, call.index_query)


def test_prompt_longer_than_the_models_positions(model: torch.nn.Module) -> None:
    dsa.attach(model, TINY_CONFIG)
    with pytest.warns(UserWarning, match=r"300 tokens are more than the 256 positions .* extrapolated by its RoPE"):
        model(tiny_tokens(1, 300))
    gpt2 = tiny_model("gpt2")
    dsa.attach(gpt2, TINY_CONFIG)
    with pytest.raises(ValueError, match="300 tokens are more than the 256 positions"):
        gpt2(tiny_tokens(1, 300))


def test_attention_dropout_is_refused() -> None:
    model = tiny_model("llama", attention_dropout=0.1).train()
    dsa.attach(model, TINY_CONFIG)
    with pytest.raises(NotImplementedError, match="dropout to 0"):
        model(tiny_tokens(1, 20))


def test_cache_filled_before_attaching(model: torch.nn.Module) -> None:
    cache = model(tiny_tokens(1, 20)).past_key_values
    dsa.attach(model, TINY_CONFIG)
    with pytest.raises(ValueError, match="filled before dsa was attached"):
        model(tiny_tokens(1, 2), past_key_values=cache)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": 8, "sinks": 4, "local": 5}, r"top_k must be at least sinks \+ local.*raise top_k to 9"),
        ({"top_k": "many"}, "top_k must be a whole number, got 'many'"),
        ({"index_dtype": "int4"}, "index_dtype must be one of"),
        ({"index_rope_dim": 5}, "even"),
        ({"index_head_dim": 4, "index_rope_dim": 6}, r"at most index_head_dim \(4\)"),
        ({"layers": {1: {"share": 1}}}, "earlier layer"),
        ({"layers": {1: {"share": 0, "dense": True}}}, "cannot be combined"),
        ({"layers": {1: {"budget": 3}}}, "LayerConfig or a mapping"),
        ({"layers": {1: {"top_k": 5}}}, r"layers\[1\].top_k must be at least sinks"),
        ({"budget": 5}, "no field 'budget'"),
    ],
)
def test_bad_configurations(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DSAConfig().replace(**fields)


def test_config_survives_json() -> None:
    import json

    config = DSAConfig(top_k=512, layers={3: LayerConfig(dense=True), 5: LayerConfig(share=4)})
    assert DSAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_taken_off_and_put_on_again(model: torch.nn.Module) -> None:
    dsa.attach(model, TINY_CONFIG)
    tokens = tiny_tokens(1, 40)
    before = model(tokens).logits
    taken = take_off(model)
    assert not dsa.is_attached(model)
    report = put_on(model, taken)
    assert not report.trained
    assert torch.equal(model(tokens).logits, before)
    taken = take_off(model)
    assert put_on(model, taken, top_k=12, layers={1: {"dense": True}}).config.top_k == 12
    taken = take_off(model)
    with pytest.raises(ValueError, match="layer 1 had no indexer"):
        put_on(model, taken, layers={})
    with pytest.raises(ValueError, match="index_heads is 2 in these indexers, got 3"):
        put_on(model, taken, index_heads=3)
    assert not dsa.is_attached(model)


def test_weights_that_nobody_keeps_are_refused(model: torch.nn.Module) -> None:
    dsa.attach(model, TINY_CONFIG)
    with pytest.raises(ValueError, match=r"output_attentions: .* call dsa.detach\(model\) first"):
        model(tiny_tokens(1, 12), output_attentions=True)
