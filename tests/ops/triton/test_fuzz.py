"""The fuzzer finds nothing in the Triton kernels."""

import torch

from dsa.ops import sparse_attention
from dsa.testing.cases import Case, make_inputs
from dsa.testing.fuzz.run import OPERATIONS, fuzz


def test_some_seconds_find_no_difference() -> None:
    operations = sorted(set(OPERATIONS) - {"dense_attention"})
    result = fuzz(seed=0, seconds=10, operations=operations, implementations=("triton",))
    assert not result.failures, "\n".join(result.failures)


def test_sinks_that_do_not_lie_one_after_the_other(device: str) -> None:
    """Found by the fuzzer: the kernels read what lay between them."""
    inputs = make_inputs(Case("strided_sinks", batch=1, tokens=1, keys=9, sink=True), device)
    apart = torch.full((2 * inputs.q.shape[2],), torch.nan, device=device)
    apart[::2] = inputs.sink_logits
    tensors = inputs.q, inputs.k, inputs.v, inputs.indices
    expected, _ = sparse_attention(*tensors, sink_logits=inputs.sink_logits, impl="triton")
    actual, _ = sparse_attention(*tensors, sink_logits=apart[::2], impl="triton")
    assert torch.equal(actual, expected)
