"""Whole models' work against counting query by query with formulas written out."""

import pytest

from dsa import DSAConfig, LayerConfig
from dsa.cost import PARTS, Storage, Work, decode_work, memory, prefill_work, read_model, request_work, total
from dsa.cost.work import QUERIES_PER_READ

LLAMA, _ = read_model("Llama-3-8B")
V32, NATIVE = read_model("DeepSeek-V3.2")
CONFIG = DSAConfig(
    top_k=512, index_heads=4, index_head_dim=32, layers={0: LayerConfig(dense=True), 2: LayerConfig(share=1)}
)


def test_one_token_of_a_grouped_model() -> None:
    dense = decode_work(LLAMA, None, 8192, 8192)
    sparse = decode_work(LLAMA, CONFIG, 8192, 8192)
    projections = 32 * 4096 * 128 * (32 + 8 + 8 + 32)
    assert dense["attention_projections"] == Work(projections, weight_bytes=2 * projections)
    assert dense["attention"] == Work(
        32 * 8192 * 32 * 256, cache_read=32 * 8192 * 8 * 256 * 2, cache_written=32 * 8 * 256 * 2
    )
    assert dense["feed_forward"].multiply_adds == 32 * 3 * 4096 * 14336
    assert dense["lm_head"].multiply_adds == 4096 * 128256
    assert sparse["attention"].multiply_adds == (8192 + 31 * 512) * 32 * 256
    assert sparse["index_scan"] == Work(30 * 8192 * (4 * 33 + 1), cache_read=30 * 8192 * 36)
    assert sparse["selection"] == Work(comparisons=30 * 8192)
    projected = 30 * 4096 * (32 + 4 * 32 + 4)
    assert sparse["indexer_projections"] == Work(projected, weight_bytes=2 * projected, cache_written=30 * 36)
    for part in ("attention_projections", "feed_forward", "lm_head"):
        assert sparse[part] == dense[part]
    assert all(dense[part] == Work() for part in ("index_scan", "selection", "indexer_projections"))


def test_below_the_budget_nothing_is_scored() -> None:
    dense, sparse = decode_work(LLAMA, None, 512, 512), decode_work(LLAMA, CONFIG, 512, 512)
    assert sparse["attention"] == dense["attention"]
    assert sparse["index_scan"] == Work()
    assert sparse["indexer_projections"].multiply_adds == 30 * 4096 * 32


def test_latent_attention_is_expanded_in_dense_prefill_and_absorbed_elsewhere() -> None:
    pairs = 61 * 4096 * 4097 // 2
    assert prefill_work(V32, None, 4096)["attention"].multiply_adds == pairs * 128 * 320
    assert decode_work(V32, None, 4096, 4096)["attention"].multiply_adds == 61 * 4096 * 128 * 1088
    selected = 61 * (2048 * 2049 // 2 + 2048 * 2048)
    assert prefill_work(V32, NATIVE, 4096)["attention"].multiply_adds == selected * 128 * 1088
    step = decode_work(V32, NATIVE, 4096, 4096)
    assert step["attention"].multiply_adds == 61 * 2048 * 128 * 1088
    assert step["attention"].cache_read == 61 * 2048 * 576 * 2
    assert step["indexer_projections"].multiply_adds == 61 * (1536 * 64 * 128 + 7168 * (64 + 128))
    assert step["index_scan"].cache_read == 61 * 4096 * 132


@pytest.mark.parametrize("config", [None, CONFIG, DSAConfig(top_k=300)])
@pytest.mark.parametrize("span", [(1, 700), (1, 300), (300, 301), (511, 515)])
def test_tokens_add_up(config: DSAConfig | None, span: tuple[int, int]) -> None:
    first, last = span
    together = decode_work(LLAMA, config, first, last)
    alone = [decode_work(LLAMA, config, n, n) for n in range(first, last + 1)]
    for part in PARTS:
        assert together[part].to_json() == pytest.approx(sum((each[part] for each in alone), Work()).to_json())


def test_a_prompt_reads_weights_once_and_shares_reads() -> None:
    prompt, tokens = prefill_work(LLAMA, CONFIG, 1000), decode_work(LLAMA, CONFIG, 1, 1000)
    for part in ("attention_projections", "attention", "index_scan", "feed_forward"):
        assert prompt[part].multiply_adds == pytest.approx(tokens[part].multiply_adds)
    assert prompt["feed_forward"].weight_bytes == tokens["feed_forward"].weight_bytes / 1000
    assert prompt["lm_head"].multiply_adds == tokens["lm_head"].multiply_adds / 1000
    assert prompt["index_scan"].cache_read == pytest.approx(tokens["index_scan"].cache_read / QUERIES_PER_READ)
    # The dense layer's queries share reads, those of the 31 others do not.
    dense, selected = 1000 * 1001 / 2, 512 * 513 / 2 + 488 * 512
    assert prompt["attention"].cache_read == pytest.approx((dense / 128 + 31 * selected) * 8 * 256 * 2)


def test_experts_that_are_read() -> None:
    assert decode_work(V32, None, 9, 9)["feed_forward"].weight_bytes == 2 * sum(
        layer.feed_forward.active_parameters for layer in V32.layers
    )
    everything = 2 * sum(layer.feed_forward.parameters for layer in V32.layers)
    assert prefill_work(V32, None, 32)["feed_forward"].weight_bytes == everything
    assert prefill_work(V32, None, 31)["feed_forward"].weight_bytes < everything


def test_a_request() -> None:
    request = request_work(LLAMA, CONFIG, 900, 100)
    parts = prefill_work(LLAMA, CONFIG, 900), decode_work(LLAMA, CONFIG, 901, 1000)
    assert total(request) == total({part: parts[0][part] + parts[1][part] for part in PARTS})
    assert request_work(LLAMA, CONFIG, 900, 0) == parts[0]


def test_memory() -> None:
    held = memory(LLAMA, CONFIG, 1000, Storage(weights=1, cache=4))
    assert held.keys_and_values == 32 * 1000 * 8 * 256 * 4
    assert held.index_keys == 30 * 1000 * 36
    assert held.weights == LLAMA.parameters
    assert held.indexers == 30 * 4096 * (32 + 4 * 32 + 4)
    assert memory(LLAMA, None, 1000).index_keys == 0


def test_windows_cost_the_same_either_way() -> None:
    gemma = {"model_type": "gemma2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16, "vocab_size": 99}
    from dsa.cost import shape_from

    shape = shape_from({**gemma, **heads}, "tiny")
    assert decode_work(shape, None, 100, 100)["attention"].multiply_adds == (16 + 100) * 4 * 16
    assert decode_work(shape, DSAConfig(top_k=300), 400, 400)["attention"].multiply_adds == (16 + 300) * 4 * 16
    assert memory(shape, None, 100, Storage(cache=1)).keys_and_values == (16 + 100) * 2 * 16


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="1 <= first <= last"):
        decode_work(LLAMA, None, 3, 2)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        prefill_work(LLAMA, None, 0)
    with pytest.raises(ValueError, match="decoded must not be negative"):
        request_work(LLAMA, None, 5, -1)
    with pytest.raises(ValueError, match="bytes of one number of the cache must be above 0"):
        Storage(cache=0)
