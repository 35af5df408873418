"""What a layer computes with, read from weights that are packed, in parts or on disk."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import dsa
from dsa.models.fingerprint import describe_base_model, distance, is_same
from dsa.models.weights import compute_dtype, entries, execution_device, matrices
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens


class Packed(nn.Module):
    """A linear layer of bytes, as quantizers put one in the place of `nn.Linear`."""

    def __init__(self, linear: nn.Linear, levels: int) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.detach().float().abs().amax(1, keepdim=True) / levels
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8).flatten())
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.view(self.out_features, self.in_features).float() * self.scale
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def pack(model: nn.Module, levels: int) -> nn.Module:
    """A copy of a model with every linear layer of its decoder packed."""
    packed = copy.deepcopy(model)
    for name, module in list(packed.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed.set_submodule(name, Packed(module, levels))
    return packed


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "deepseek_v3", "olmo2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_have_the_dtype_matrices_and_fingerprint_of_the_plain_ones(model_type, dtype) -> None:
    model = tiny_model(model_type).to(dtype)
    packed = pack(model, 127)
    block, plain = (next(m for m in each.modules() if isinstance(m, nn.ModuleList))[0] for each in (packed, model))
    assert compute_dtype(block) == compute_dtype(plain) == dtype
    assert execution_device(block) == torch.device("cpu")
    assert [m.shape for m in matrices(packed)] == [m.shape for m in matrices(model)]
    ours, theirs = describe_base_model(packed), describe_base_model(model)
    assert distance(ours, theirs) < 0.02


@pytest.mark.parametrize("bias", [True, False])
def test_entries_of_a_packed_layer_are_those_it_computes_with(bias: bool) -> None:
    linear = nn.Linear(12, 20, bias=bias)
    [matrix] = matrices(Packed(linear, 127))
    rows, columns = torch.randint(20, (50,)), torch.randint(12, (50,))
    torch.testing.assert_close(entries(matrix, rows, columns), linear.weight[rows, columns], atol=2e-3, rtol=0)
    [matrix] = matrices(linear)
    assert torch.equal(entries(matrix, rows, columns), linear.weight[rows, columns])


def test_indexers_go_between_a_model_and_its_packed_copies_and_to_no_other(tmp_path: Path) -> None:
    model = tiny_model("llama")
    packed = pack(model, 7)
    other = pack(tiny_model("llama", seed=1), 7)
    assert is_same(describe_base_model(model), describe_base_model(packed))
    assert not is_same(describe_base_model(model), describe_base_model(other))
    dsa.attach(model, TINY_CONFIG)
    dsa.attach(packed, indexers=dsa.save_indexers(model, tmp_path / "a.safetensors"))
    again = tiny_model("llama")
    dsa.attach(again, indexers=dsa.save_indexers(packed, tmp_path / "b.safetensors"))
    with pytest.raises(ValueError, match="another model of the same size"):
        dsa.attach(other, indexers=tmp_path / "a.safetensors")


def test_a_layer_whose_norms_are_fp32_and_whose_weights_are_bytes_computes_in_fp32() -> None:
    block = nn.ModuleDict({"linear": Packed(nn.Linear(4, 4, bias=False), 127), "norm": nn.LayerNorm(4)})
    assert compute_dtype(block) == torch.float32
    assert compute_dtype(block.to(torch.bfloat16)) == torch.bfloat16


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_weights_on_disk(model_type: str, tmp_path: Path) -> None:
    """accelerate's offloading: parameters without data, which are read when a layer runs."""
    pytest.importorskip("accelerate")
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "model")
    dsa.attach(model, TINY_CONFIG)
    file = dsa.save_indexers(model, tmp_path / "a.safetensors")
    tokens = tiny_tokens(1, 40)
    kept = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={"model.embed_tokens": "disk", "model.layers": "disk", **kept},
        offload_folder=tmp_path / "offloaded",
        dtype=torch.float32,
    ).eval()
    dsa.attach(loaded, indexers=file)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    dsa.load_indexers(loaded, dsa.save_indexers(loaded, tmp_path / "b.safetensors"))
    written = loaded.generate(tokens, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(tokens))
    assert written.shape[1] > 40
