"""Predicted work against counting a real forward, part by part, within 1 %."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsa import DSAConfig, LayerConfig, accelerate, attach
from dsa.cost import PARTS, Storage, decode_work, read_model, total
from dsa.testing.born_with_dsa import born_model
from dsa.testing.counting import count_decoding
from dsa.testing.tiny_models import tiny_model, tiny_tokens

FP32 = Storage(weights=4, cache=4)
SPARSE = DSAConfig(top_k=8, index_heads=2, index_head_dim=8, sinks=1, local=2)

CASES: dict[str, tuple[str, int, DSAConfig, dict[str, Any]]] = {
    "GQA": ("llama", 37, SPARSE, {}),
    "one KV head": ("llama", 24, SPARSE, {"num_key_value_heads": 1}),
    "heads of their own": ("qwen3", 25, SPARSE, {"num_key_value_heads": 4, "head_dim": 16}),
    "odd sizes": ("llama", 31, DSAConfig(top_k=7, index_heads=3, index_head_dim=6, sinks=0, local=0), {}),
    "fp32 index keys": ("qwen2", 21, SPARSE.replace(index_dtype="fp32"), {}),
    "shared": ("llama", 33, SPARSE.replace(layers={1: LayerConfig(share=0)}), {}),
    "several budgets": (
        "llama",
        40,
        SPARSE.replace(layers={0: LayerConfig(dense=True), 2: LayerConfig(top_k=16), 3: LayerConfig(share=2)}),
        {"num_hidden_layers": 4},
    ),
    "K of the whole length": ("llama", 19, SPARSE.replace(top_k=19), {}),
    "K beyond": ("llama", 19, SPARSE.replace(top_k=64), {}),
    "one token": ("llama", 1, SPARSE, {}),
    "experts": ("mixtral", 23, SPARSE, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "plain blocks": ("gpt_neox", 23, SPARSE, {}),
    "GPT-2": ("gpt2", 23, SPARSE, {}),
    "wide": ("llama", 129, SPARSE.replace(top_k=32), {"hidden_size": 64, "intermediate_size": 96}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dense", [False, True], ids=["dsa", "dense"])
@pytest.mark.parametrize("case", CASES)
def test_predicted_and_counted(case: str, dense: bool, tmp_path: Path) -> None:
    model_type, tokens, config, changes = CASES[case]
    model = tiny_model(model_type, **changes)
    model.config.save_pretrained(tmp_path)
    shape, _ = read_model(str(tmp_path))
    every = range(len(shape.layers))
    attach(model, DSAConfig(layers={layer: LayerConfig(dense=True) for layer in every}) if dense else config)
    counted = count_decoding(model, tiny_tokens(1, tokens))
    predicted = decode_work(shape, None if dense else config, 1, tokens, FP32)
    for part in PARTS:
        assert predicted[part].to_json() == pytest.approx(counted.parts[part].to_json(), rel=0.01), part
    assert total(predicted).to_json() == pytest.approx(total(counted.parts).to_json(), rel=0.01)
    assert counted.elsewhere.multiply_adds == counted.elsewhere.bytes == 0


@pytest.mark.parametrize("top_k", [8, 29, 64])
@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_latent_attention(model_type: str, top_k: int, tmp_path: Path) -> None:
    model = born_model(model_type, index_topk=top_k, n_shared_experts=1)
    model.config.save_pretrained(tmp_path)
    shape, native = read_model(str(tmp_path))
    accelerate(model, index_dtype="int8")
    counted = count_decoding(model, tiny_tokens(1, 29))
    predicted = decode_work(shape, native, 1, 29, FP32)
    for part in PARTS:
        plain, seen = predicted[part].to_json(), counted.parts[part].to_json()
        if part == "attention":
            # The reference reads a row's latent once as a key and once as a value, a kernel reads the row once.
            latent, rope = 20, 8
            assert plain["cache_read"] * (2 * latent + rope) / (latent + rope) == pytest.approx(seen["cache_read"])
            del plain["cache_read"], seen["cache_read"], plain["bytes"], seen["bytes"]
        assert plain == pytest.approx(seen, rel=0.01), part
    assert counted.elsewhere.multiply_adds == counted.elsewhere.bytes == 0


def test_what_the_counter_counts() -> None:
    """The counter itself, on products whose size is plain."""
    model = tiny_model("llama", num_hidden_layers=1)
    attach(model, DSAConfig(layers={0: LayerConfig(dense=True)}))
    counted = count_decoding(model, torch.tensor([[5, 6, 7]]))
    assert counted.parts["lm_head"].multiply_adds == 3 * 32 * 97
    assert counted.parts["lm_head"].weight_bytes == 3 * 32 * 97 * 4
    assert counted.parts["attention"].multiply_adds == (1 + 2 + 3) * 4 * (8 + 8)
    assert counted.parts["attention"].cache_read == (1 + 2 + 3) * 2 * (8 + 8) * 4
    assert counted.parts["attention"].cache_written == 3 * 2 * (8 + 8) * 4
