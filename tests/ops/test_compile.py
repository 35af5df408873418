"""torch.compile: the compiled kernels are nodes of its graphs."""

from collections.abc import Callable, Iterator

import pytest
import torch

from dsa.ops import dense_attention, index_topk, native_support, quantize_index_keys, sparse_attention

pytestmark = pytest.mark.skipif(native_support.missing() is not None, reason="the kernels were not built")

Q, K, INDEX_Q = torch.randn(2, 5, 6, 16), torch.randn(2, 40, 2, 16), torch.randn(2, 5, 4, 16)
WEIGHT = torch.randn(2, 5, 4)
KEYS = quantize_index_keys(torch.randn(2, 40, 16))
INDICES = index_topk(INDEX_Q, KEYS, WEIGHT, 8)
STARTS = torch.full((2, 5), 3, dtype=torch.int32)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "step",
    [
        lambda q: sparse_attention(q, K, K, INDICES, softcap=20.0)[0] * 2,
        lambda q: sparse_attention(q, K, K, INDICES, sink_logits=torch.ones(6))[1] * 2,
        lambda q: dense_attention(q, K, K)[0] * 2,
        lambda q: index_topk(q[:, :, :4], KEYS, WEIGHT, 8, sinks=1, local=2) + 1,
        lambda q: index_topk(q[:, :, :4], K[:, :, 0], WEIGHT, 8, key_start=STARTS) + 1,
    ],
    ids=["sparse", "sparse with sink logits", "dense", "int8 keys", "fp32 keys and ranges"],
)
def test_compiles_into_one_graph(step: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with torch.no_grad():
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(Q)
        assert torch.equal(compiled, step(Q))


def test_indices_are_still_checked() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="indices must lie in"):
        torch.compile(lambda q: sparse_attention(q, K, K, INDICES + 40)[0], backend="aot_eager", fullgraph=True)(Q)


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_gradients_pass_all_the_same() -> None:
    grads = []
    for run in (torch.compile(dense_attention, backend="aot_eager"), dense_attention):
        q = Q.clone().requires_grad_()
        run(q, K, K)[0].square().sum().backward()
        grads.append(q.grad)
    assert torch.equal(*grads)
