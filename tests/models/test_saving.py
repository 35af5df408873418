"""Saved models load in a fresh process through plain transformers."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    pipeline,
)

import dsa
from dsa.models.attached import config_of
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens

LOAD = """
import sys, torch
{first}
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
from dsa.testing.tiny_models import tiny_tokens
model = AutoModelForCausalLM.from_pretrained({folder!r}{argument})
save_file({{"logits": model(tiny_tokens(1, 40)).logits.detach()}}, {out!r})
"""


@pytest.fixture
def model() -> PreTrainedModel:
    model = tiny_model("llama")
    dsa.attach(model, TINY_CONFIG, layers={1: {"top_k": 12}})
    return model


@pytest.mark.parametrize(
    ("first", "argument"),
    [("import dsa", ""), ("import transformers, dsa", ""), ("", ", trust_remote_code=True")],
    ids=["dsa first", "transformers first", "remote code"],
)
def test_fresh_process_gives_identical_logits(
    model: PreTrainedModel, tmp_path: Path, first: str, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, out = tmp_path / "model", tmp_path / "logits.safetensors"
    model.save_pretrained(folder)
    code = LOAD.format(first=first, argument=argument, folder=str(folder), out=str(out))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert torch.equal(load_file(out)["logits"], model(tiny_tokens(1, 40)).logits)


def test_config_and_generation_survive(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert config_of(again) == config_of(model)
    assert again.config.model_type == "dsa_llama"
    tokens = tiny_tokens(1, 30)
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(again.generate(tokens, **arguments), model.generate(tokens, **arguments))
    dsa.detach(again)
    assert again.config.model_type == "llama"
    again.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain).__name__ == "LlamaForCausalLM"


def test_pipeline(model: PreTrainedModel, tmp_path: Path, tiny_tokenizer) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    text = "a b c d e f g h i j k l m n o p"
    live = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)(text, **arguments)
    loaded = pipeline("text-generation", model=str(tmp_path))(text, **arguments)
    assert live == loaded
    assert loaded[0]["generated_text"].startswith(text)


def test_missing_weight_is_not_filled_in_silently(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.indexer.wq.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.indexer\.wq\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "deepseek_v3"])
def test_a_class_without_indexers_refuses_the_folder(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    plain = type(model)
    dsa.attach(model, TINY_CONFIG)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"nothing is attached to it.*AutoModelForCausalLM"):
        plain.from_pretrained(tmp_path)(tiny_tokens(1, 40))
    code = f"from transformers import {plain.__name__}; {plain.__name__}.from_pretrained({str(tmp_path)!r})"
    if model_type == "llama":
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ended.returncode
        assert 'attn_implementation="dsa"' in ended.stderr
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    implementation = loaded.dsa_attached.implementation
    assert implementation not in (None, "dsa")
    dsa.detach(loaded)
    loaded.save_pretrained(tmp_path / "plain")
    again = plain.from_pretrained(tmp_path / "plain")
    assert again.config._attn_implementation == implementation
    torch.testing.assert_close(again(tiny_tokens(1, 40)).logits, loaded(tiny_tokens(1, 40)).logits)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "deepseek_v3"])
def test_auto_model_is_the_sparse_decoder(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    dsa.attach(model, TINY_CONFIG)
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert dsa.is_attached(decoder)
    tokens = tiny_tokens(1, 40)
    sparse = model.base_model(tokens).last_hidden_state
    assert torch.equal(decoder(tokens).last_hidden_state, sparse)
    decoder.save_pretrained(tmp_path / "decoder")
    again = AutoModel.from_pretrained(tmp_path / "decoder")
    assert torch.equal(again(tokens).last_hidden_state, sparse)
    dsa.detach(again)
    assert type(again).__name__ == type(model.base_model).__name__
    assert not torch.equal(again(tokens).last_hidden_state, sparse)


def test_class_needs_its_config() -> None:
    from dsa.models.saving import DSALlamaForCausalLM

    with pytest.raises(ValueError, match=r"needs config\.dsa"):
        DSALlamaForCausalLM(tiny_model("llama").config)


class Subclassed(LlamaForCausalLM):
    """A user's own."""


@pytest.mark.parametrize("kept", [LlamaForSequenceClassification, LlamaModel, Subclassed])
def test_a_class_that_is_kept_says_how_its_indexers_are_saved(
    kept: type[PreTrainedModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_model("llama").config
    config.pad_token_id = 0
    model = kept(config).eval()
    dsa.attach(model, TINY_CONFIG)
    assert type(model) is kept
    sparse = model(tiny_tokens(2, 40))[0]
    for saving in (model, copy.deepcopy(model)):
        caplog.clear()
        saving.save_pretrained(tmp_path)
        assert f"{kept.__name__} was saved as a dense model" in caplog.text
        assert "dsa.save_indexers(model, DIR)" in caplog.text
        assert "dsa.attach(model, indexers=DIR)" in caplog.text
    # What the words say works.
    dsa.save_indexers(model, tmp_path / "indexers")
    loaded = kept.from_pretrained(tmp_path).eval()
    assert not dsa.is_attached(loaded)
    dsa.attach(loaded, indexers=tmp_path / "indexers")
    torch.testing.assert_close(loaded(tiny_tokens(2, 40))[0], sparse)
    dsa.detach(model)
    caplog.clear()
    model.save_pretrained(tmp_path)
    assert not caplog.text


def test_one_that_is_saved_with_its_indexers_says_nothing(
    model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    model.save_pretrained(tmp_path)
    assert not caplog.text
