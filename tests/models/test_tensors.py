"""A model is what was saved: each tensor lost, renamed, reshaped, of another kind or cut is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

import dsa
from dsa.cli.main import app
from dsa.models.loading import load_model
from dsa.testing.born_with_dsa import born_model
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

WEIGHTS = "model.safetensors"


def attached(model_type: str) -> PreTrainedModel:
    model = tiny_model(model_type, vocab_size=BYTE_VOCABULARY)
    dsa.attach(model, TINY_CONFIG)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_model("llama", vocab_size=BYTE_VOCABULARY),
    "mixtral": lambda: tiny_model("mixtral", vocab_size=BYTE_VOCABULARY, num_local_experts=3),
    "deepseek_v3": lambda: tiny_model("deepseek_v3", vocab_size=BYTE_VOCABULARY),
    "deepseek_v32": lambda: born_model("deepseek_v32", vocab_size=BYTE_VOCABULARY),
    "attached llama": lambda: attached("llama"),
}


def _lose(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _rename(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}x"] = tensors.pop(name)


def _reshape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.cat((tensors[name], tensors[name]))


def _narrow(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int8)


ENDS = ("gate.weight",)
DAMAGES = {"lost": _lose, "renamed": _rename, "reshaped": _reshape, "of whole numbers": _narrow}


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    MODELS[request.param]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_tensor_that_is_not_what_it_was_is_refused_by_name(saved: Path, damage: str) -> None:
    whole = load_file(saved / WEIGHTS)
    try:
        for name in whole:
            tensors = dict(whole)
            DAMAGES[damage](tensors, name)
            save_file(tensors, saved / WEIGHTS, metadata={"format": "pt"})
            with pytest.raises((ValueError, OSError)) as caught:
                load_model(str(saved), device="cpu")
            said = str(caught.value)
            assert said.startswith("model: "), said
            # Mixtral's router has another name in memory.
            assert name in said or any(name.endswith(end) and end in said for end in ENDS), said
            assert str(saved) in said
    finally:
        save_file(whole, saved / WEIGHTS, metadata={"format": "pt"})
    load_model(str(saved), device="cpu")


def test_a_cut_file_is_named(saved: Path) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (saved / WEIGHTS).write_bytes(whole[:size])
        with pytest.raises(OSError, match=rf"^model: the weights of .* are damaged: {WEIGHTS}"):
            load_model(str(saved), device="cpu")
    (saved / WEIGHTS).write_bytes(whole)


def test_a_shard_is_named(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    tiny_tokenizer().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_model(str(tmp_path), device="cpu")
    tensors = load_file(shards[1])
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name][:1].contiguous()}, shards[1], metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"{name} in {shards[1]} is [")):
        load_model(str(tmp_path), device="cpu")
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(OSError, match=f"damaged: {shards[1].name}"):
        load_model(str(tmp_path), device="cpu")
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        load_model(str(tmp_path), device="cpu")


def test_tied_weights_and_layers_that_predict_several_tokens_are_no_faults(tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=BYTE_VOCABULARY, tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert "lm_head.weight" not in tensors
    load_model(str(tmp_path), device="cpu")
    extra = {"model.layers.2.eh_proj.weight": torch.zeros(3)}
    save_file({**tensors, **extra}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.2\.eh_proj\.weight in .* is no tensor of the Llama"):
        load_model(str(tmp_path), device="cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["eval", "--file", __file__, "--tokens", "40"]])
def test_commands_end_with_one_sentence(tmp_path: Path, command: list[str]) -> None:
    MODELS["llama"]().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.wei"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    result = CliRunner().invoke(app, [command[0], str(tmp_path), *command[1:]])
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "model.layers.1.mlp.up_proj.weight is missing" in said
    assert "Traceback" not in result.output
