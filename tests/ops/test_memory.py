"""No operation makes a tensor that grows with the square of the length, in either direction."""

import pytest
import torch

from dsa.ops import dense_attention, index_topk, indexer_loss, quantize_index_keys, sparse_attention
from dsa.testing.memory import LargestTensor

LENGTH = 16384
QUERIES = 512
"""Enough for scores of 32 MB a head: blocks must split them."""

LIMIT = 20 << 20


def normal(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_index_topk(form: str) -> None:
    k = normal(1, LENGTH, 16)
    keys = quantize_index_keys(k) if form == "int8" else k
    with LargestTensor() as largest:
        index_topk(normal(1, QUERIES, 4, 16), keys, normal(1, QUERIES, 4), 64, sinks=2, local=8)
    assert largest.bytes <= LIMIT


def test_index_topk_skips_scores_that_decide_nothing() -> None:
    start = torch.arange(LENGTH)[None].sub(63).clamp_min(0)
    with LargestTensor() as largest:
        index_topk(normal(1, LENGTH, 1, 1), normal(1, LENGTH, 1), normal(1, LENGTH, 1), 64, key_start=start)
    assert largest.bytes <= LENGTH * 64 * 8


def test_sparse_attention() -> None:
    q, k, v = (normal(1, LENGTH, 2, 4).requires_grad_() for _ in range(3))
    indices = torch.randint(0, LENGTH, (1, LENGTH, 8), dtype=torch.int32)
    with LargestTensor() as largest:
        sparse_attention(q, k, v, indices)[0].sum().backward()
    assert largest.bytes <= LIMIT


def test_dense_attention() -> None:
    q = normal(1, QUERIES, 4, 8).requires_grad_()
    k, v = (normal(1, LENGTH, 2, 8).requires_grad_() for _ in range(2))
    with LargestTensor() as largest:
        dense_attention(q, k, v)[0].sum().backward()
    assert largest.bytes <= LIMIT


@pytest.mark.parametrize("selected", [False, True])
def test_indexer_loss(selected: bool) -> None:
    tokens = LENGTH if selected else QUERIES
    index = [x.requires_grad_() for x in (normal(1, tokens, 4, 8), normal(1, LENGTH, 8), normal(1, tokens, 4))]
    q, k = normal(1, tokens, 4, 8), normal(1, LENGTH, 2, 8)
    indices = torch.randint(0, LENGTH, (1, LENGTH, 8), dtype=torch.int32) if selected else None
    with LargestTensor() as largest:
        indexer_loss(*index, q, k, indices=indices, sinks=2, local=8).backward()
    assert largest.bytes <= LIMIT


def test_a_window_costs_what_it_sees() -> None:
    """16,384 queries and keys, each query seeing 64: the blocks' columns follow the ranges."""
    end = torch.arange(1, LENGTH + 1)[None]
    ranges = {"key_start": (end - 64).clamp_min(0), "key_end": end}
    q, k, v = (normal(1, LENGTH, 1, 4) for _ in range(3))
    with LargestTensor() as largest:
        dense_attention(q, k, v, **ranges)
        indexer_loss(q, k[:, :, 0], normal(1, LENGTH, 1), q, k, **ranges)
        index_topk(q, k[:, :, 0], normal(1, LENGTH, 1), 16, **ranges)
    assert largest.bytes <= LIMIT
