"""Weights in fewer bits: packed in any order, widened again, saved, loaded, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaForSequenceClassification, PreTrainedModel

import dsa
from dsa.models import packing
from dsa.models.packed import packed_layers
from dsa.models.weights import compute_dtype, entries, matrices
from dsa.modules.packed_linear import PackedEmbedding, PackedLinear
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens

FORMS: list[packing.Form] = ["int8", "int4", "bf16"]


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors without bf16 are slow at it, not wrong."""
    monkeypatch.setattr(packing, "has_bf16", lambda: True)


def tied(family: str = "llama") -> PreTrainedModel:
    model = tiny_model(family, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_tokens(1, 40)).logits


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of half the tokens, since rounding may send one to another expert."""
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).median())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "mixtral", "deepseek_v3"])
def test_a_packed_model_is_the_model_of_its_numbers(family: str, form: packing.Form) -> None:
    model = tiny_model(family)
    plain = logits(model)
    report = dsa.pack_weights(model, form)
    packed = logits(model)
    assert report.bytes_after < report.bytes_before
    assert sum(report.formats.values()) == len(packed_layers(model))
    # Widened, only the rounding of activations is gone.
    widened = dsa.pack_weights(model, "fp32")
    assert widened.formats == {}
    assert not packed_layers(model)
    assert not hasattr(model.config, "dsa_weights")
    assert apart(packed, logits(model)) <= 0.05
    if form == "bf16":
        assert apart(packed, plain) <= 0.05


@pytest.mark.parametrize("form", FORMS)
def test_tied_weights_are_packed_once_and_tied_when_widened(form: packing.Form) -> None:
    model = tied()
    report = dsa.pack_weights(model, form)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert head.source is embedding
    assert "lm_head.blocks" not in model.state_dict()
    numbers = embedding.numbers()
    assert torch.equal(model.get_input_embeddings()(torch.arange(97)), numbers)
    assert torch.equal(head.numbers(), numbers)
    again = dsa.pack_weights(model, form)
    assert (again.formats, again.bytes_after, again.bytes_before) == (report.formats, *[report.bytes_after] * 2)
    dsa.pack_weights(model, "fp32")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_from_one_form_to_another() -> None:
    model = tied()
    dsa.pack_weights(model, "int8")
    report = dsa.pack_weights(model, "int4")
    assert report.formats == {"Q8_0": 2, "Q4_1": 14}
    assert str(report).startswith("weights int4: 2 in Q8_0, 14 in Q4_1; 0 MB before, 0 MB now")
    head = model.get_output_embeddings()
    assert dsa.pack_weights(model, "bf16").formats == {"BF16": 16}
    assert model.get_output_embeddings() is not head
    assert model.get_output_embeddings().source is model.get_input_embeddings()


def test_what_is_no_plain_layer_is_left_and_said() -> None:
    model = tiny_model("gemma3_text")
    report = dsa.pack_weights(model, "int8")
    # Gemma's embedding multiplies what it looks up, and the head is tied to it.
    assert report.left == ("model.embed_tokens", "lm_head")
    assert "2 left as they are (model.embed_tokens, ...)" in str(report)


@pytest.mark.parametrize("form", FORMS)
def test_before_and_after_attaching(form: packing.Form) -> None:
    first, second = tied(), tied()
    dsa.pack_weights(first, form)
    dsa.attach(first, TINY_CONFIG)
    dsa.attach(second, TINY_CONFIG)
    dsa.pack_weights(second, form)
    assert not [name for name in packed_layers(second) if "indexer" in name]
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(first), logits(second))
    dsa.detach(first)
    dsa.pack_weights(second, "fp32")
    dsa.detach(second)
    assert (logits(first) - logits(second)).norm() <= 0.05 * logits(second).norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ties", [True, False])
def test_saved_and_loaded(form: packing.Form, ties: bool, tmp_path: Path) -> None:
    model = tied() if ties else tiny_model("llama")
    dsa.attach(model, TINY_CONFIG)
    dsa.pack_weights(model, form)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert packed_layers(loaded).keys() == packed_layers(model).keys()
    assert (loaded.get_output_embeddings().source is loaded.get_input_embeddings()) == ties
    decoder = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        same = decoder(tiny_tokens(1, 40)).last_hidden_state
        assert torch.equal(same, model.model(tiny_tokens(1, 40)).last_hidden_state)
    dsa.pack_weights(loaded, "fp32")
    loaded.save_pretrained(tmp_path / "wide")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert torch.equal(logits(wide), logits(loaded))


def test_a_copy_is_a_model_of_its_own() -> None:
    model = tied()
    dsa.pack_weights(model, "int8")
    other = copy.deepcopy(model)
    assert other.get_output_embeddings().source is other.get_input_embeddings()
    dsa.pack_weights(model, "fp32")
    assert packed_layers(other)
    assert torch.isfinite(logits(other)).all()


def test_packed_models_that_nothing_would_load_are_not_saved(tmp_path: Path) -> None:
    model = tiny_model("llama")
    dsa.pack_weights(model, "int8")
    with pytest.raises(ValueError, match="weights of this LlamaForCausalLM are packed, and only attached models"):
        model.save_pretrained(tmp_path)
    dsa.attach(model, TINY_CONFIG)
    model.save_pretrained(tmp_path)
    dsa.detach(model)
    with pytest.raises(ValueError, match="are packed"):
        model.save_pretrained(tmp_path)
    dsa.pack_weights(model, "fp32")
    model.save_pretrained(tmp_path)
    classifier = LlamaForSequenceClassification(tiny_model("llama").config)
    dsa.attach(classifier, TINY_CONFIG)
    dsa.pack_weights(classifier, "int8")
    with pytest.raises(ValueError, match="LlamaForSequenceClassification are packed"):
        classifier.save_pretrained(tmp_path)


def test_indexers_know_a_packed_model_again(tmp_path: Path) -> None:
    model = tied()
    dsa.attach(model, TINY_CONFIG)
    dsa.save_indexers(model, tmp_path)
    other = tied()
    dsa.pack_weights(other, "int4")
    assert dsa.attach(other, indexers=tmp_path).config.top_k == TINY_CONFIG.top_k


def test_entries_and_dtypes_are_those_of_the_layers() -> None:
    model = tiny_model("qwen2")
    dsa.pack_weights(model, "int8")
    for matrix in matrices(model):
        rows, columns = torch.tensor([0, 5]), torch.tensor([3, 1])
        expected = matrix.module.numbers()[rows, columns]
        torch.testing.assert_close(entries(matrix, rows, columns), expected, rtol=1e-3, atol=1e-4)
    assert compute_dtype(model.model.layers[0]) == torch.float32


def test_gradients_reach_what_is_not_packed() -> None:
    model = tiny_model("qwen2")
    dsa.pack_weights(model, "int8")
    model(tiny_tokens(1, 12)).logits.square().mean().backward()
    norm = model.model.layers[0].input_layernorm.weight
    assert norm.grad is not None
    assert norm.grad.abs().sum() > 0
    assert model.model.layers[0].self_attn.q_proj.bias.grad is not None


def test_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="weights: expected one of int8, int4, bf16, fp32, got 'int2'"):
        dsa.pack_weights(model, "int2")  # type: ignore[arg-type]
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"weights: model.layers.1.mlp.up_proj has a weight of inf"):
        dsa.pack_weights(model, "int8")
    monkeypatch.setattr(packing, "has_bf16", lambda: False)
    with pytest.raises(ValueError, match="weights: this processor has no instructions for bf16"):
        dsa.pack_weights(model, "bf16")
    assert not packed_layers(model)
    with pytest.raises(ValueError, match="is on meta, and packed weights run on the CPU"):
        dsa.pack_weights(model.to("meta"), "int8")


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    dsa.attach(model, TINY_CONFIG)
    dsa.pack_weights(model, "int8")
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    for found, changed in (("Q8_0", "Q2_K"), ("0.self_attn.q_proj", "7.self_attn.q_proj")):
        whole = config.read_text()
        config.write_text(whole.replace(found, changed, 1))
        with pytest.raises(ValueError, match=r"model: config.json names .*under dsa_weights, expected a linear"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        config.write_text(whole)
