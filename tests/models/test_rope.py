"""RoPE scaling: what is asked for reaches the model, is saved with the indexers, and is honoured or refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import dsa
from dsa.models.extension import scaling_wanted
from dsa.models.loading import load_model
from dsa.models.rope import extend_positions, parse_scaling, scaling_of
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    tiny_model("llama", vocab_size=BYTE_VOCABULARY, max_position_embeddings=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_two_ways_to_say_it() -> None:
    assert parse_scaling("yarn:4") == {"rope_type": "yarn", "factor": 4.0}
    assert parse_scaling('{"type": "linear", "factor": 2}') == {"rope_type": "linear", "factor": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yarn", "must look like yarn:4"),
        ("yarn:many", "must look like yarn:4"),
        ("dynamic:4", "'dynamic' is not among linear, yarn, llama3"),
        ("yarn:1", "the factor must be above 1"),
        ('{"factor"', "is not JSON"),
        ('{"factor": 2}', "None is not among"),
    ],
)
def test_what_makes_no_sense(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_scaling(text)


def test_configurations_that_cannot_be_scaled() -> None:
    with pytest.raises(ValueError, match="has no rotary positions to scale"):
        extend_positions(tiny_model("gpt2").config, parse_scaling("yarn:2"))
    config = LlamaConfig(max_position_embeddings=64)
    with pytest.raises(ValueError, match="llama3 needs low_freq_factor and high_freq_factor"):
        extend_positions(config, parse_scaling("llama3:2"))
    with pytest.raises(ValueError, match="other angles for each kind of layer"):
        extend_positions(tiny_model("gemma3_text").config, parse_scaling("yarn:2"))


def test_a_scaled_model_and_its_indexers(saved: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scaling = parse_scaling("yarn:4")
    long = load_model(saved, device="cpu", rope_scaling=scaling).model
    assert long.config.max_position_embeddings == 256
    assert long.model.rotary_emb.rope_type == "yarn"
    plain = load_model(saved, device="cpu").model
    ids = torch.arange(3, 203)[None]
    with torch.no_grad():
        assert not torch.allclose(long(ids).logits, plain(ids).logits, atol=1e-3)

    dsa.attach(long, TINY_CONFIG)
    file = dsa.save_indexers(long, tmp_path / "long.safetensors")
    with pytest.raises(ValueError, match=r"trained with RoPE scaling yarn:4, the model has plain RoPE; load the model"):
        dsa.attach(plain, indexers=file)
    wanted = scaling_wanted(None, file)
    assert wanted == scaling_of(long.config)
    again = load_model(saved, device="cpu", rope_scaling=wanted).model
    dsa.attach(again, indexers=file)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, long(ids).logits)

    long.save_pretrained(tmp_path / "sparse")
    tiny_tokenizer().save_pretrained(tmp_path / "sparse")
    loaded = load_model(str(tmp_path / "sparse"), device="cpu", rope_scaling=scaling).model
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, long(ids).logits)
    with pytest.raises(ValueError, match=r"has RoPE scaling yarn:4 already, so RoPE scaling linear:2 cannot be added"):
        load_model(str(tmp_path / "sparse"), device="cpu", rope_scaling=parse_scaling("linear:2"))

    dsa.attach(plain, TINY_CONFIG)
    short = dsa.save_indexers(plain, tmp_path / "short.safetensors")
    dsa.detach(again)
    with caplog.at_level(logging.WARNING, logger="dsa"):
        dsa.attach(again, indexers=short)
    assert "was trained with plain RoPE, the model has RoPE scaling yarn:4" in caplog.text
