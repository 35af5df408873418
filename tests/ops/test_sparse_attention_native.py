"""What only the compiled `sparse_attention` has to show: no dependence on threads, blocks of queries, rare layouts."""

import pytest
import torch

from dsa.ops import native_support, sparse_attention
from dsa.testing.cases import Case, make_inputs

pytestmark = pytest.mark.skipif(native_support.missing() is not None, reason="the kernels are not built")
LARGE = Case("large", batch=2, tokens=150, keys=400, heads=6, groups=3, head_dim=40, value_dim=24, top_k=200)


def run(threads: int, tokens: slice = slice(None)) -> list[torch.Tensor]:
    inputs = make_inputs(LARGE)
    q, k, v = (x.requires_grad_() for x in (inputs.q[:, tokens], inputs.k, inputs.v))
    torch.set_num_threads(threads)
    out, lse = sparse_attention(q, k, v, inputs.indices[:, tokens], impl="native")
    return [out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))]


@pytest.mark.parametrize("isa", native_support.isas() if native_support.missing() is None else [])
def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    before = native_support.isa()
    native_support.set_isa(isa)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(1), run(3)))
    finally:
        native_support.set_isa(before)


def test_pieces_of_a_query_agree_with_blocks_of_queries() -> None:
    whole, few = run(1), run(1, slice(100, 103))
    torch.testing.assert_close(few[0], whole[0][:, 100:103])
    torch.testing.assert_close(few[1], whole[1][:, 100:103])


@pytest.mark.parametrize("tokens", [1, 150])
def test_neighbours_that_share_their_tokens(tokens: int) -> None:
    inputs = make_inputs(LARGE)
    shared = inputs.indices[:, :1].sort(dim=-1).values.expand(-1, tokens, -1)
    expected = sparse_attention(inputs.q[:, :tokens], inputs.k, inputs.v, shared, impl="reference")
    actual = sparse_attention(inputs.q[:, :tokens], inputs.k, inputs.v, shared, impl="native")
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [400, -2, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_index_outside_is_an_error(value: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(LARGE)
    indices = inputs.indices.to(dtype)
    indices[1, 149, 199] = value
    with pytest.raises(ValueError, match=r"indices must lie in \[-1, S\) = \[-1, 400\)"):
        sparse_attention(inputs.q, inputs.k, inputs.v, indices, impl="native")


def test_rows_that_are_not_in_one_piece() -> None:
    inputs = make_inputs(LARGE)
    k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (inputs.k, inputs.v))
    indices = inputs.indices.transpose(1, 2).contiguous().transpose(1, 2)
    expected = sparse_attention(inputs.q, inputs.k, inputs.v, inputs.indices, impl="native")
    for a, b in zip(sparse_attention(inputs.q, k, v, indices, impl="native"), expected):
        assert torch.equal(a, b)
