"""Several selections of a query through the Triton kernels, which take one after the other."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsa.ops import index_topk, indexer_loss, quantize_index_keys, sparse_attention
from dsa.testing.cases import SELECTION_CASES, Inputs, make_inputs

CASE = replace(
    next(case for case in SELECTION_CASES if case.name == "each_softcap_and_sink_logits"), tokens=2, keys=19, batch=1
)


@pytest.fixture
def inputs(device: str) -> Inputs:
    return make_inputs(CASE, device)


def test_selections(inputs: Inputs) -> None:
    keys = quantize_index_keys(inputs.k_index)
    found, expected = (
        index_topk(inputs.q_index, keys, inputs.w_index, CASE.top_k, sinks=CASE.sinks, local=CASE.local, impl=impl)
        for impl in ("triton", "reference")
    )
    assert found.shape == (1, 2, 3, CASE.top_k)
    assert torch.equal(found, expected)


def test_attention_and_gradients(inputs: Inputs) -> None:
    def run(impl: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        options = {"softcap": CASE.softcap, "sink_logits": inputs.sink_logits, "impl": impl}
        out, lse = sparse_attention(*leaves, inputs.indices, **options)
        return [out.detach(), lse, *torch.autograd.grad(out.square().sum(), leaves)]

    for found, expected in zip(run("triton"), run("reference")):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_loss_and_gradients(inputs: Inputs) -> None:
    def run(impl: str) -> list[Tensor]:
        index = [x.clone().requires_grad_() for x in (inputs.q_index, inputs.k_index, inputs.w_index)]
        loss = indexer_loss(
            *index, inputs.q, inputs.k, indices=inputs.indices, softcap=CASE.softcap, sink_logits=inputs.sink_logits,
            sinks=1, local=1, impl=impl,
        )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, index)]

    for found, expected in zip(run("triton"), run("reference")):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
