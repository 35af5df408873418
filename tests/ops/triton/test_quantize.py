"""Quantisation in Triton writes the bytes of the reference."""

import pytest
import torch
from torch import Tensor

from dsa.ops import QuantizedKeys, quantize_index_keys, quantize_index_queries
from dsa.ops.quantize.triton import _write_keys, quantize_weighted_queries

# The interpreter computes with NumPy, which warns of the rows that are there for that.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

DIMS = [1, 2, 16, 24, 128]


def make_rows(dim: int, device: str) -> Tensor:
    """`[2, 37, dim]` of many sizes, with rows of zeros, NaN, infinity, and numbers near the smallest ones."""
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(2, 37, dim, generator=generator) * torch.rand(2, 37, 1, generator=generator).exp2() ** 9
    rows[0, 0], rows[1, 3] = 0.0, 1e-44
    rows[0, 1, 0], rows[1, 2, -1] = torch.nan, -torch.inf
    rows[1, 4] *= 1e-38
    rows[1, 5] *= 1e35
    return rows.to(device)


def assert_same(actual: QuantizedKeys, expected: QuantizedKeys) -> None:
    assert torch.equal(actual.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(actual.scale.isnan(), expected.scale.isnan())
    assert torch.equal(actual.scale.nan_to_num(0.0), expected.scale.nan_to_num(0.0))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("dim", DIMS)
def test_bytes_are_those_of_the_reference(dim: int, dtype: str, device: str) -> None:
    rows = make_rows(dim, device)
    expected = quantize_index_keys(rows.cpu(), dtype, impl="reference")
    assert_same(quantize_index_keys(rows, dtype, impl="triton").to("cpu"), expected)
    strided = torch.empty(37, 2, 2 * dim, device=device).transpose(0, 1)[..., ::2].copy_(rows)
    assert_same(quantize_index_keys(strided, dtype, impl="triton").to("cpu"), expected)
    expected = quantize_index_keys(rows.cpu(), dtype, power_of_two=True, impl="reference")
    assert_same(quantize_index_keys(rows, dtype, power_of_two=True, impl="triton").to("cpu"), expected)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_keys_are_appended_to_a_cache(impl: str, dtype: str, device: str) -> None:
    rows = make_rows(16, device).bfloat16()
    cache = quantize_index_keys(torch.ones(2, 64, 16, device=device), dtype)
    before = quantize_index_keys(torch.ones(2, 64, 16, device=device), dtype)
    written = cache[:, 20:57]
    assert quantize_index_keys(rows, dtype, out=written, impl=impl) is written
    assert_same(cache[:, 20:57].to("cpu"), quantize_index_keys(rows.cpu(), dtype, impl="reference"))
    assert_same(cache[:, :20], before[:, :20])
    assert_same(cache[:, 57:], before[:, 57:])


def test_a_wrong_place_to_write_is_refused(device: str) -> None:
    rows = make_rows(16, device)
    for out in (quantize_index_keys(rows, "fp8"), quantize_index_keys(rows)[:, 1:]):
        with pytest.raises(ValueError, match=r"out must be int8 \[2, 37, 16\].*slice it"):
            quantize_index_keys(rows, "int8", out=out)


def test_nothing_to_quantise(device: str) -> None:
    assert quantize_index_keys(torch.empty(2, 0, 16, device=device), impl="triton").shape == (2, 0, 16)


@pytest.mark.parametrize("dim", [16, 24])
def test_queries_come_with_their_coefficients(dim: int, device: str) -> None:
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(2, 5, 3, dim, generator=generator).to(device)
    w = torch.randn(2, 3, 5, generator=generator).to(device).transpose(1, 2)
    q[1, 2, 1] = torch.inf
    data, coefficient = quantize_weighted_queries(q, w, 0.3, "int8")
    expected, scale = quantize_index_queries(q.cpu())
    assert torch.equal(data.cpu().transpose(1, 2), expected)
    wanted = (w.cpu() * scale) * 0.3
    assert torch.equal(coefficient.cpu().transpose(1, 2).nan_to_num(9.0), wanted.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_is_one_operator(dtype: str, device: str) -> None:
    rows = torch.ones(1, 3, 16, device=device)
    data = torch.empty(1, 3, 16, dtype=torch.uint8 if dtype == "fp8" else torch.int8, device=device)
    scale = torch.empty(1, 3, device=device)
    torch.library.opcheck(_write_keys, (rows, data, scale, False))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_appending_compiles_into_one_graph(dtype: str, device: str) -> None:
    rows = make_rows(16, device)[:, 6:20]
    caches = [quantize_index_keys(torch.ones(2, 64, 16, device=device), dtype) for _ in range(2)]

    def append(rows: Tensor, cache: QuantizedKeys) -> Tensor:
        return quantize_index_keys(rows * 2, dtype, out=cache[:, 5:19], impl="triton").scale * 2

    compiled = torch.compile(append, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows, caches[0]), append(rows, caches[1]))
    assert_same(*caches)
