"""Dense latent attention, attached, trained, written as DeepSeek-V3.2: plain transformers computes the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV32ForCausalLM, PreTrainedModel

import dsa
from dsa.models.attached import indexers_of
from dsa.testing.tiny_models import tiny_model, tiny_tokens
from dsa.testing.training import random_tokens
from dsa.train import SparseSettings, WarmupSettings, train_indexers, train_sparse

# Sixteen index heads: with few, many scores are exactly zero and every rule for ties selects other tokens.
SIZES: dict[str, Any] = {"top_k": 12, "index_heads": 16, "index_head_dim": 16}
TOKENS = 61

LOAD = """
import sys
sys.modules["dsa"] = None  # any import of it fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, attn_implementation="eager").eval()
assert type(model).__name__ == "DeepseekV32ForCausalLM"
chosen = []
for layer in model.model.layers:
    layer.self_attn.indexer.register_forward_hook(lambda module, args, out: chosen.append(out))
with torch.no_grad():
    logits = model(torch.tensor({ids})).logits
    short = model(torch.tensor({ids})[:, :{top_k}]).logits
found = {{f"layer {{n}}": each for n, each in enumerate(chosen[: len(model.model.layers)])}}
save_file({{"logits": logits, "short": short.contiguous(), **found}}, {out!r})
"""


def attached(model_type: str = "deepseek_v3", **changes: Any) -> PreTrainedModel:
    model = tiny_model(model_type, **changes)
    torch.manual_seed(1)
    dsa.attach(model, **SIZES)
    return model


def logits(model: PreTrainedModel, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def selections(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def observe(call: dsa.AttentionCall) -> None:
        assert call.indices is not None
        found.append(call.indices)

    logits(model, tokens, dsa_context=dsa.DSAContext(observer=observe))
    return found


def test_attached_trained_and_loaded_by_plain_transformers(tmp_path: Path) -> None:
    model, tokens = tiny_model("deepseek_v3"), tiny_tokens(1, TOKENS)
    dense = logits(model, tokens)
    dsa.attach(model, **SIZES)
    short = logits(model, tokens[:, : SIZES["top_k"]])
    torch.testing.assert_close(short, dense[:, : SIZES["top_k"]], atol=1e-5, rtol=0)
    before = {layer: indexer.wq_b.weight.clone() for layer, indexer in indexers_of(model).items()}
    stream = random_tokens()
    train_indexers(model, stream, tmp_path / "warmup", WarmupSettings(steps=3, seq_len=48, queries_per_update=16))
    sparse = SparseSettings(steps=2, seq_len=48, all_parameters=True, lr=1e-3)
    train_sparse(model, stream, tmp_path / "sparse", sparse)
    assert all(not torch.equal(before[layer], indexer.wq_b.weight) for layer, indexer in indexers_of(model).items())
    folder, out = dsa.export_deepseek_v32(model, tmp_path / "v32"), tmp_path / "out.safetensors"
    code = LOAD.format(folder=str(folder), ids=tokens.tolist(), out=str(out), top_k=SIZES["top_k"])
    subprocess.run([sys.executable, "-c", code], check=True)
    loaded = load_file(out)
    torch.testing.assert_close(loaded["logits"], logits(model, tokens), atol=1e-4, rtol=0)
    assert (loaded["logits"] - logits(model, tokens, dsa_context=dsa.DSAContext(mode="dense"))).abs().max() > 1e-2
    dsa_short = logits(model, tokens[:, : SIZES["top_k"]], dsa_context=dsa.DSAContext(mode="dense"))
    torch.testing.assert_close(loaded["short"], dsa_short, atol=1e-4, rtol=0)
    full = slice(SIZES["top_k"], None)
    for layer, mine in enumerate(selections(model, tokens)):
        theirs = loaded[f"layer {layer}"]
        assert torch.equal(mine[:, full].sort().values, theirs[:, full].sort().values)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("deepseek_v3", {"rope_interleave": False}),
        ("deepseek_v3", {"attention_bias": True, "tie_word_embeddings": True, "first_k_dense_replace": 2}),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                             "original_max_position_embeddings": 64, "mscale": 1.0,
                                             "mscale_all_dim": 1.0}}),
        ("deepseek_v2", {"first_k_dense_replace": 2}),
        ("glm4_moe_lite", {"rms_norm_eps": 1e-5}),
        ("youtu", {"num_hidden_layers": 4, "rope_interleave": False}),
    ],
    ids=["half-split RoPE", "biases and tied embeddings", "YaRN", "DeepSeek-V2 without experts", "GLM-4.7-Flash",
         "Youtu-LLM"],
)  # fmt: skip
def test_variants_of_the_form(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model, tokens = attached(model_type, **changes), tiny_tokens(2, TOKENS)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.endswith("bias") and "self_attn.q_a" in name:
                each.normal_()
    expected = logits(model, tokens)
    dsa.export_deepseek_v32(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(loaded) is DeepseekV32ForCausalLM
    torch.testing.assert_close(logits(loaded, tokens), expected, atol=1e-4, rtol=0)
    # The model is still what it was.
    assert torch.equal(logits(model, tokens), expected)


def test_what_was_written_runs_sparse(tmp_path: Path) -> None:
    model, tokens = attached(), tiny_tokens(1, TOKENS)
    dsa.export_deepseek_v32(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV32ForCausalLM"]
    assert (config["index_topk"], config["index_n_heads"], config["index_head_dim"]) == (12, 16, 16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    dsa.accelerate(loaded)
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), atol=1e-5, rtol=0)


def test_a_bf16_model_keeps_its_dtype(tmp_path: Path) -> None:
    model = attached().to(torch.bfloat16)
    dsa.export_deepseek_v32(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["model.layers.0.self_attn.indexer.wk.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


class TestRefused:
    def test_what_has_no_place_in_v32(self, tmp_path: Path) -> None:
        for model, message in (
            (attached("deepseek_v3", q_lora_rank=None), "no query latent"),
            (attached("deepseek_v2"), "experts by a softmax"),
        ):
            with pytest.raises(ValueError, match=message):
                dsa.export_deepseek_v32(model, tmp_path)
        for overrides, message in (
            ({"sinks": 1, "local": 2}, "always reads 1 first and 2 last"),
            ({"layers": {1: {"dense": True}}}, "layer 1 of .* is dense"),
            ({"layers": {1: {"share": 0}}}, "layer 1 of .* shares the selection of 0"),
            ({"layers": {0: {"top_k": 9}}}, "layer 0 of .* budget of its own"),
        ):
            model = tiny_model("deepseek_v3")
            dsa.attach(model, **SIZES, **overrides)
            with pytest.raises(ValueError, match=message):
                dsa.export_deepseek_v32(model, tmp_path)

    def test_other_models(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is not attached"):
            dsa.export_deepseek_v32(tiny_model("deepseek_v3"), tmp_path)
        model = tiny_model("llama")
        dsa.attach(model, top_k=12, sinks=0, local=0)
        with pytest.raises(ValueError, match=r"cannot be written as a DeepSeek-V3\.2: that needs latent attention"):
            dsa.export_deepseek_v32(model, tmp_path)

    def test_adapters(self, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        model = attached()
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["kv_b_proj"]))
        with pytest.raises(ValueError, match="merge adapters"):
            dsa.export_deepseek_v32(model, tmp_path)
