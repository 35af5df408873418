"""Predicted costs, against counting query by query."""

import pytest

from dsa import DSAConfig, LayerConfig
from dsa.cost import AttentionShape, layer_cost, mean_read, mean_scanned, model_cost

SHAPE = AttentionShape(9, 3, 64, 64, 4, 32)


@pytest.mark.parametrize("span", [(1, 1), (1, 40), (17, 40), (40, 40), (1, 16), (16, 17)])
@pytest.mark.parametrize("top_k", [1, 16, 39, 40, 100, None])
def test_means(span: tuple[int, int], top_k: int | None) -> None:
    visible = range(span[0], span[1] + 1)
    limit = top_k or 1000
    assert mean_read(*span, top_k) == pytest.approx(sum(min(seen, limit) for seen in visible) / len(visible))
    if top_k is not None:
        scanned = sum(seen for seen in visible if seen > top_k) / len(visible)
        assert mean_scanned(*span, top_k) == pytest.approx(scanned)


def test_a_layer() -> None:
    sparse, shared, dense = (layer_cost(SHAPE, kind, 8192, 8192, 512) for kind in ("sparse", "shared", "dense"))
    assert (sparse.tokens_read, shared.tokens_read, dense.tokens_read) == (512, 512, 8192)
    assert (sparse.tokens_scanned, shared.tokens_scanned, dense.tokens_scanned) == (8192, 0, 0)
    assert shared.operations == 512 * 2 * 9 * 128
    assert sparse.operations - shared.operations == 8192 * 2 * 4 * 33
    assert shared.bytes == 512 * 4 * 3 * 128
    assert sparse.bytes - shared.bytes == 8192 * 36


def test_a_model() -> None:
    config = DSAConfig(top_k=512, layers={0: LayerConfig(dense=True), 2: LayerConfig(share=1)})
    total = model_cost(config, SHAPE, range(4), 8192, 8192)
    assert total.tokens_read == 8192 + 3 * 512
    assert total.tokens_scanned == 2 * 8192
    assert model_cost(None, SHAPE, range(4), 8192, 8192).tokens_read == 4 * 8192


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="1 <= first <= last"):
        layer_cost(SHAPE, "dense", 2, 1)
    with pytest.raises(ValueError, match="top_k is needed"):
        layer_cost(SHAPE, "shared", 1, 2)
