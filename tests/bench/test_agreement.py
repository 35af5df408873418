"""Wrong results are noticed before a figure is reported."""

from dataclasses import replace

import pytest
import torch

from dsa.bench import agreement, operations
from dsa.bench.measure import Disagreement
from dsa.bench.prefill import sparse_prefill
from dsa.bench.tensors import DEFAULT_MODEL_SIZES, LayerTensors, Sizes, gaussian
from dsa.ops import QuantizedKeys, dense_attention, hadamard_transform, index_topk

SIZES = replace(DEFAULT_MODEL_SIZES, top_k=16, local=4)


@pytest.fixture(scope="module")
def tensors() -> LayerTensors:
    return gaussian(SIZES, 77)


def prefilled(tensors: LayerTensors, sizes: Sizes = SIZES) -> torch.Tensor:
    out = torch.full_like(tensors.query, float("nan"))
    return sparse_prefill(tensors, sizes, out)


def test_a_right_prefill_passes(tensors: LayerTensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsa.bench.prefill.QUERIES_AT_A_TIME", 20)
    rows = agreement.spread_rows(0, 77)
    selection, _ = agreement.check_selection(tensors, SIZES, rows)
    assert "within" in agreement.check_sparse("DSA", prefilled(tensors), tensors, rows, selection)


def test_a_short_prefill_is_dense(tensors: LayerTensors) -> None:
    short = tensors.prefix(16)
    rows = agreement.spread_rows(0, 16)
    agreement.check_dense("DSA", prefilled(short), short, rows)


def test_decoding_queries_are_right_aligned(tensors: LayerTensors) -> None:
    last = operations.last_queries(tensors, 5)
    rows = agreement.spread_rows(0, 5)
    agreement.check_dense("dense", dense_attention(last.query, last.key, last.value)[0], last, rows)
    expected = index_topk(last.index_query, last.index_key, last.index_weight, 16, sinks=SIZES.sinks, local=4)
    assert torch.equal(agreement.check_selection(last, SIZES, rows)[0], expected[:, rows])


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_wrong_output_is_refused(tensors: LayerTensors, wrong: float) -> None:
    out = prefilled(tensors)
    out[0, 76, 0, 0] += wrong
    rows = agreement.spread_rows(0, 77)
    selection = agreement.reference_selection(tensors, SIZES, rows)
    with pytest.raises(Disagreement, match="DSA differs from the reference"):
        agreement.check_sparse("DSA", out, tensors, rows, selection)


def test_a_wrong_selection_is_refused(tensors: LayerTensors, monkeypatch: pytest.MonkeyPatch) -> None:
    def select(*args: object, impl: str, **options: object) -> torch.Tensor:
        right = index_topk(*args, **options)  # type: ignore[arg-type]
        return right if impl == "reference" else right.roll(1, dims=1)

    monkeypatch.setattr(agreement, "index_topk", select)
    with pytest.raises(Disagreement, match="selects other tokens"):
        agreement.check_selection(tensors, SIZES, agreement.spread_rows(0, 77))


def test_the_peers_of_the_index_select_alike(tensors: LayerTensors) -> None:
    assert isinstance(tensors.index_key, QuantizedKeys)
    query, key = hadamard_transform(tensors.index_query), tensors.index_key.dequantize()
    plain = operations.select_in_torch(query, key, tensors.index_weight, 8)
    eager = operations.indexer_of_transformers(query, key, tensors.index_weight, 8)()
    wanted = index_topk(query, key, tensors.index_weight, 8)
    wide, rows = replace(tensors, index_query=query, index_key=key), torch.arange(77)
    for peer in (plain, eager):
        assert "within" in operations.check_scores("peer", peer[0], wanted[0], wide, rows)
    plain[0, 40, 3] = (plain[0, 40, 3] + 1) % 40
    with pytest.raises(Disagreement, match="peer selects tokens whose scores differ"):
        operations.check_scores("peer", plain[0], wanted[0], wide, rows)
