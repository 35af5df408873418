"""Attached models whose queries make several selections: one for each KV head, or for each of several parts of them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import dsa
from dsa import DSAConfig, DSAContext, LayerConfig
from dsa.config import DSAConfig as Config
from dsa.cost.attention import AttentionShape
from dsa.eval.mass import measure_layer
from dsa.eval.selections import selection
from dsa.generation.sources import Watch
from dsa.models.attached import config_of, indexers_of
from dsa.models.attachment import put_on, take_off
from dsa.models.checkpoint import read_indexers
from dsa.models.context import AttentionCall
from dsa.report.recording import Recorder as Reading
from dsa.report.recording import measure
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens
from dsa.testing.training import CONFIG, SETTINGS, Recorder, attached, random_tokens
from dsa.train import RunOptions, train_indexers

SEVERAL = TINY_CONFIG.replace(selections="kv")


def make(model_type: str = "llama", **changes: object) -> PreTrainedModel:
    model = tiny_model(model_type).double()
    dsa.attach(model, SEVERAL, **changes)
    return model


def calls_of(model: PreTrainedModel, tokens: torch.Tensor, **options: object) -> dict[int, AttentionCall]:
    seen: dict[int, AttentionCall] = {}
    context = DSAContext(observer=lambda call: seen.update({call.layer: call}), **options)
    with torch.no_grad():
        model(tokens, use_cache=False, dsa_context=context)
    return seen


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "laguna", "gpt_bigcode", "gpt2", "deepseek_v3"])
def test_a_budget_for_everything_equals_dense(model_type: str) -> None:
    model, tokens = tiny_model(model_type).double(), tiny_tokens(2, 30)
    with torch.no_grad():
        expected = model(tokens).logits
        dsa.attach(model, SEVERAL, top_k=64, dense_shortcut=False)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_each_group_selects_for_itself(model_type: str) -> None:
    model = make(model_type)
    calls = calls_of(model, tiny_tokens(1, 40))
    assert calls
    for call in calls.values():
        assert call.indices is not None
        assert call.indices.shape == (1, 40, 2, 8)
        assert not torch.equal(call.indices[:, :, 0], call.indices[:, :, 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cached_equals_uncached(dtype: torch.dtype) -> None:
    """fp32 decodes through the compiled kernels, where they were built."""
    model, tokens = make().to(dtype), tiny_tokens(1, 44)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        rows = [model(tokens[:, :31], past_key_values=cache).logits]
        rows += [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(31, 44)]
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing() -> None:
    model, tokens = make(), tiny_tokens(1, 33)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), tokens), dim=1)
    mask = (torch.arange(38) >= 5).long()[None]
    with torch.no_grad():
        positions = (torch.arange(38) - 5).clamp(min=0)[None]
        found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
        torch.testing.assert_close(found, model(tokens).logits, rtol=1e-9, atol=1e-9)


def test_layers_differ_and_share() -> None:
    model = tiny_model("llama", num_hidden_layers=4).double()
    layers = {0: LayerConfig(selections=1), 2: LayerConfig(share=1), 3: LayerConfig(top_k=12)}
    report = dsa.attach(model, SEVERAL, layers=layers)
    assert [row.selections for row in report.layers] == [1, 2, 2, 2]
    assert "layer 1: sparse, reads 8 tokens per query by each of 2 selections" in str(report)
    assert [indexer.weights_proj.weight.shape[0] for indexer in indexers_of(model).values()] == [2, 4, 4]
    calls = calls_of(model, tiny_tokens(1, 40), every_layer=True)
    assert calls[0].indices.shape == (1, 40, 8)
    assert torch.equal(calls[2].indices, calls[1].indices)
    assert calls[3].indices.shape == (1, 40, 2, 12)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, tokens = make().float(), tiny_tokens(1, 40)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert config_of(again).selections == "kv"
    assert torch.equal(again(tokens).logits, expected)
    dsa.save_indexers(model, tmp_path / "indexers")
    fresh = tiny_model("llama")
    dsa.attach(fresh, indexers=tmp_path / "indexers")
    assert torch.equal(fresh(tokens).logits, expected)
    taken = take_off(fresh)
    put_on(fresh, taken)
    assert torch.equal(fresh(tokens).logits, expected)
    dsa.detach(fresh)
    with pytest.raises(ValueError, match="has selections=kv, but the config asks for 1"):
        dsa.attach(fresh, TINY_CONFIG, indexers=tmp_path / "indexers")


def test_indexers_of_one_selection_serve_each_of_several(tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, 40)
    dsa.attach(model, TINY_CONFIG)
    expected = calls_of(model, tokens)
    dsa.save_indexers(model, tmp_path)
    dsa.detach(model)
    dsa.attach(model, indexers=tmp_path, selections="kv")
    for layer, call in calls_of(model, tokens).items():
        assert torch.equal(call.indices[:, :, 0], expected[layer].indices)
        assert torch.equal(call.indices[:, :, 1], expected[layer].indices)


def test_files_from_before_have_one_selection(tmp_path: Path) -> None:
    plain = TINY_CONFIG.to_dict()
    del plain["selections"]
    assert Config.from_dict(plain) == TINY_CONFIG
    assert read_indexers("default").config.selections == 1


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="selections must divide the KV heads of layer 0: got 3 for 2; use 1, 'kv'"):
        dsa.attach(model, TINY_CONFIG, selections=3)
    assert not dsa.is_attached(model)
    assert model.config._attn_implementation != "dsa"
    with pytest.raises(ValueError, match="selections must be a whole number of at least 1, or 'kv'"):
        DSAConfig(selections="heads")
    with pytest.raises(ValueError, match="cannot be combined with dense, top_k, local or selections"):
        DSAConfig(layers={1: LayerConfig(share=0, selections=2)})
    latent = tiny_model("deepseek_v3")
    report = dsa.attach(latent, SEVERAL)
    assert {row.selections for row in report.layers} == {1}
    dsa.detach(latent)
    with pytest.raises(ValueError, match="got 2 for 1"):
        dsa.attach(latent, TINY_CONFIG, selections=2)


def test_the_oracle_is_one_for_each_selection() -> None:
    model, tokens = make(), tiny_tokens(1, 60)
    calls = calls_of(model, tokens, mode="dense")
    for call in calls.values():
        several = measure_layer(call, SEVERAL, 20)
        one = dataclasses.replace(call, index_weight=call.index_weight[:, :, 0])
        shared = measure_layer(one, TINY_CONFIG, 20)
        assert several.oracle > shared.oracle
        assert several.window == pytest.approx(shared.window)
        assert several.dsa <= several.oracle
    choose = selection("oracle", SEVERAL)
    indices = choose(calls[0])
    assert indices.shape == (1, 60, 2, 8)
    for part, call in enumerate(calls[0].by_selection(2)):
        assert torch.equal(indices[:, :, part], selection("oracle", TINY_CONFIG)(call))
    with torch.no_grad():
        for name in ("oracle", "window"):
            model(tokens, use_cache=False, dsa_context=DSAContext(select=selection(name, SEVERAL)))


def test_a_report_shows_what_any_selection_read() -> None:
    model, tokens = make().float(), tiny_tokens(1, 60)
    recorder = Reading(config_of(model), 60, 59, 1, 2)
    with torch.no_grad():
        model(tokens, use_cache=False, dsa_context=DSAContext(observer=recorder, every_layer=True))
    call = calls_of(model, tokens)[0]
    read = [set(row.tolist()) for row in call.indices[0, 59]]
    row = recorder.rows[59][0]
    assert row.positions.tolist() == sorted(set.union(*read))
    assert row.read == 8
    assert float(row.weights.sum()) == pytest.approx(1, abs=1e-5)
    only = next(iter(read[0] - read[1]))
    head = measure(call.by_selection(2)[0], 59, 8, 60)
    expected = head.weights[head.positions.tolist().index(only)] / 2
    assert row.weights[row.positions.tolist().index(only)] == pytest.approx(float(expected))
    assert float(recorder.rates(0).max()) <= 1
    counted = torch.zeros(60, dtype=torch.int32)
    for query in range(8, 60):
        for key in set(call.indices[0, query].flatten().tolist()):
            if 1 <= key < query + 1 - 2:
                counted[key] += 1
    assert torch.equal(recorder.counts[0].selected, counted)


def test_sources_add_the_heads_up() -> None:
    model, tokens = make().float(), tiny_tokens(1, 41)
    read = Watch(config_of(model), 40)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(tokens[:, :40], past_key_values=cache)
        model(tokens[:, 40:], past_key_values=cache, dsa_context=read.context())
    assert 0 < float(read.weights.sum()) < 1


@pytest.mark.parametrize("start", ["random", "fitted"])
def test_training_teaches_every_selection(tmp_path: Path, start: str) -> None:
    config = CONFIG.replace(selections="kv")
    model, unseen = attached(config=config), random_tokens(96, seed=9).ids.long()[None]

    def kept() -> list[float]:
        calls = calls_of(model, unseen, mode="dense")
        parts = [part for call in calls.values() for part in call.by_selection(2)]
        return [measure_layer(part, CONFIG, 32).dsa for part in parts]

    before = kept()
    settings = dataclasses.replace(SETTINGS, steps=40, seq_len=128, queries_per_update=32, start=start)
    recorder = Recorder()
    train_indexers(model, random_tokens(), tmp_path / "run", settings, RunOptions(reporter=recorder))
    if start == "random":
        assert sum(record.mean_kl for record in recorder.records[-5:]) < 0.8 * sum(
            record.mean_kl for record in recorder.records[:5]
        )
    assert all(after > some for after, some in zip(kept(), before))


def test_costs_count_the_weighting_of_each() -> None:
    one = AttentionShape(9, 3, 64, 64, 4, 32)
    three = dataclasses.replace(one, selections=3)
    assert three.operations_per_token_scanned - one.operations_per_token_scanned == 2 * 4 * 2
    assert three.bytes_per_token_read == one.bytes_per_token_read
