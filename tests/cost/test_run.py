"""What one run took, against sums over every query, and what a cache really holds."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import dsa
from dsa.config import DSAConfig
from dsa.cost import Storage, shape_from
from dsa.cost.fit import Room
from dsa.cost.run import run_cost
from dsa.testing.tiny_models import tiny_model

CONFIG = DSAConfig(
    top_k=8, index_heads=2, index_head_dim=8, sinks=2, local=2, layers={0: {"dense": True}, 2: {"share": 1}}
)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    found = tiny_model("llama", num_hidden_layers=4)
    dsa.attach(found, CONFIG)
    return found


def test_pairs_are_sums_over_queries(model: torch.nn.Module) -> None:
    read, written = 21, 5
    found = run_cost(shape_from(model.config.to_dict(), "it"), CONFIG, read, written)
    seen = range(1, read + 1)
    assert found["dense"]["attention_pairs"] == 4 * sum(seen)
    assert found["dsa"]["attention_pairs"] == sum(seen) + 3 * sum(min(8, each) for each in seen)
    assert found["dense"]["index_pairs"] == 0
    assert found["dsa"]["index_pairs"] == 2 * sum(each for each in seen if each > 8)
    pair = 2 * model.config.hidden_size
    assert found["dense"]["prompt_multiply_adds_of_attention"] == found["dense"]["attention_pairs"] * pair
    for name in ("dsa", "dense"):
        whole, attention = found[name]["prompt_multiply_adds"], found[name]["prompt_multiply_adds_of_attention"]
        assert whole > attention
    assert found["dense"]["token_multiply_adds"] > found["dense"]["token_multiply_adds_of_attention"] > 0


def test_a_single_token_comes_out_of_the_prompt(model: torch.nn.Module) -> None:
    shape = shape_from(model.config.to_dict(), "it")
    assert "token_bytes" not in run_cost(shape, CONFIG, 9, 1)["dsa"]
    with pytest.raises(ValueError, match="written must be at least 1"):
        run_cost(shape, CONFIG, 9, 0)


def test_memory_is_what_the_cache_holds(model: torch.nn.Module) -> None:
    read, written = 21, 5
    cache = DynamicCache(config=model.config)
    model(torch.arange(read + written - 1)[None], past_key_values=cache, use_cache=True)
    found = run_cost(shape_from(model.config.to_dict(), "it"), CONFIG, read, written, Storage(4, 4))["dsa"]
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == found["keys_and_values"]
    keys = [layer.index_keys() for layer in cache.layers if layer.index_dtype is not None]
    assert sum(each.data.nbytes + each.scale.nbytes for each in keys) == found["index_keys"]


@pytest.mark.parametrize("available", [10_000, 1_000_000, 123_456_789])
def test_the_most_tokens_that_fit(model: torch.nn.Module, available: int) -> None:
    room = Room(shape_from(model.config.to_dict(), "it"), CONFIG, 16, Storage(4, 4))
    fitting = room.tokens(available)
    assert room.bytes(fitting) <= available < room.bytes(fitting + 1)
    assert room.tokens(0) == 0
