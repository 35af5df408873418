"""The ratio of perplexities and its interval."""

import math

import pytest
import torch

from dsa.eval.ratio import BLOCK, perplexity_ratio


def test_the_ratio_of_all_texts_together() -> None:
    torch.manual_seed(0)
    dense = [torch.rand(100), torch.rand(37)]
    ours = [each + torch.rand(len(each)) * 0.1 for each in dense]
    found = perplexity_ratio(ours, dense)
    assert found.ratio == pytest.approx(math.exp(torch.cat(ours).mean()) / math.exp(torch.cat(dense).mean()), rel=1e-6)
    assert found.tokens == 137
    assert (found.low, found.high) == (found.ratio, found.ratio)
    assert str(found) == f"{found.ratio:.4f}"


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    covered = 0
    for _ in range(400):
        # neighbours go wrong together
        noise = torch.randn(32, 1).expand(32, BLOCK).reshape(-1) * 0.1 + torch.randn(32 * BLOCK) * 0.1
        found = perplexity_ratio([0.01 + noise], [torch.zeros(32 * BLOCK)])
        covered += found.low <= math.exp(0.01) <= found.high
    assert 0.90 <= covered / 400 <= 0.98
    assert "95 % interval" in str(found)
