"""Pairs against counting them one by one, and the figures that the guides name."""

import pytest

from dsa.cost import Pairs


@pytest.mark.parametrize("tokens", [1, 2, 17, 64])
@pytest.mark.parametrize("top_k", [1, 3, 16, 17, 63, 64, 100])
def test_counted_one_by_one(tokens: int, top_k: int) -> None:
    pairs = Pairs(tokens, top_k)
    visible = range(1, tokens + 1)
    assert pairs.dense_causal == sum(visible)
    assert pairs.dsa_causal == sum(min(seen, top_k) for seen in visible)
    assert pairs.scanned_causal == sum(seen for seen in visible if seen > top_k)
    assert pairs.dsa == sum(min(tokens, top_k) for _ in visible)


def test_known_figures() -> None:
    assert Pairs(100_000, 1_000).reduction == 100
    assert Pairs(100_000, 1_000).reduction_causal == pytest.approx(50, rel=0.01)
    document = Pairs(150_000, 3_000)
    assert (document.dense, document.dsa, document.reduction) == (22_500_000_000, 450_000_000, 50)


@pytest.mark.parametrize(("tokens", "top_k", "name"), [(0, 1, "tokens"), (1, 0, "top_k"), (5, -3, "top_k")])
def test_mistakes(tokens: int, top_k: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        Pairs(tokens, top_k)
