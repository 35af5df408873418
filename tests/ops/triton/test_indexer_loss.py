"""`indexer_loss` in Triton against the divergence written row by row, on the shared cases at small sizes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsa.ops import indexer_loss
from dsa.ops.indexer_loss import triton as kernels
from dsa.testing import oracles
from dsa.testing.cases import CASES, Case, Inputs, left_padded, make_inputs
from dsa.testing.tolerance import assert_within_yardstick

# Under the interpreter time goes by the program and the tile: few queries, and keys for more than one tile.
SMALL = [
    replace(case, tokens=min(case.tokens, 3), keys=min(case.keys, 19), batch=min(case.batch, 2))
    for case in CASES
    if case.dtype != torch.float64 and case.content != "poisoned"
]
BY_NAME = {case.name: case for case in SMALL}
both_equations = pytest.mark.parametrize("selected", [False, True], ids=["all_visible", "selected"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest tiles, so that small cases have several."""
    monkeypatch.setattr(kernels, "_DENSE", kernels._DENSE[-1:])
    monkeypatch.setattr(kernels, "_SELECTED", kernels._SELECTED[-1:])


def index_tensors(inputs: Inputs, dtype: torch.dtype | None = None) -> list[Tensor]:
    tensors = (inputs.q_index, inputs.k_index, inputs.w_index)
    return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]


def run(case: Case, inputs: Inputs, index: list[Tensor], selected: bool, impl: str = "triton") -> Tensor:
    return indexer_loss(
        *index,
        inputs.q,
        inputs.k,
        indices=inputs.indices if selected else None,
        key_start=inputs.key_start,
        key_end=inputs.key_end,
        query_mask=inputs.query_mask if case.name in ("odd_lengths", "left_padding") else None,
        sinks=case.sinks,
        local=case.local,
        softcap=case.softcap,
        sink_logits=inputs.sink_logits,
        impl=impl,
    )


def oracle(case: Case, inputs: Inputs, index: list[Tensor], selected: bool) -> Tensor:
    read = oracles.visible_positions(inputs.key_start, inputs.key_end, case.batch, case.tokens, case.keys)
    kept = oracles.without_always_read(read, case.sinks, case.local)
    if selected:
        chosen = oracles.selected_positions(inputs.indices)
        read = [[[s for s in row if s in set(seen)] for row, seen in zip(*rows)] for rows in zip(chosen, read)]
    mask = inputs.query_mask if case.name in ("odd_lengths", "left_padding") else None
    dtype = index[0].dtype
    return oracles.indexer_loss(
        *index, inputs.q.to(dtype), inputs.k.to(dtype), read, kept,
        query_mask=mask, softcap=case.softcap, sink_logits=inputs.sink_logits,
    )  # fmt: skip


def assert_agrees(case: Case, inputs: Inputs, selected: bool) -> None:
    results = []
    for function, dtype in ((run, None), (oracle, torch.float32), (oracle, torch.float64)):
        index = index_tensors(inputs, dtype)
        loss = function(case, inputs, index, selected)
        grads = torch.autograd.grad(loss, index, allow_unused=True) if loss.requires_grad else [None] * 3
        results.append((loss.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(grads, index)]))
    (loss, grads), (naive, naive_grads), (exact, exact_grads) = results
    # Differences of numbers near one; 16-bit inputs also round the gradient by the scores before it is spread.
    rounding = 8 * torch.finfo(case.dtype).eps
    assert_within_yardstick(loss, naive + 8 * torch.finfo(torch.float32).eps, exact, what="loss")
    for name, a, n, e in zip("qkw", grads, naive_grads, exact_grads):
        size = e.abs().max().item() if e.numel() else 0.0
        assert a.dtype == case.dtype
        assert_within_yardstick(a, n + rounding * max(size, 1.0), e, factor=3.0, what=f"gradient of {name}")


@both_equations
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_value_and_gradients(case: Case, selected: bool, device: str) -> None:
    assert_agrees(case, make_inputs(case, device), selected)


@both_equations
def test_many_tiles_and_wide_heads(selected: bool, device: str) -> None:
    """Several blocks of queries, tiles of keys, parts of head dims and blocks of heads."""
    case = Case("wide", batch=1, tokens=19, keys=41, heads=18, groups=1, head_dim=40, index_heads=3, index_dim=24,
                top_k=37, sinks=2, local=3, sink=True, softcap=3.0)  # fmt: skip
    case = replace(case, tokens=3 if selected else 19)
    assert_agrees(case, make_inputs(case, device), selected)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_queries_and_keys_in_turns(chunks: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(kernels, "_key_chunks", lambda *_: chunks)
    case = Case("turns", batch=2, tokens=18, keys=37, heads=2, groups=1, ranges=left_padded, sinks=1)
    assert_agrees(case, make_inputs(case, device), selected=False)


@both_equations
def test_unseen_keys_and_queries_never_matter(selected: bool, device: str) -> None:
    """NaN where no query looks, as uninitialised memory has it, reaches neither the loss nor a gradient."""
    case = replace(BY_NAME["left_padding"], tokens=4, keys=20)
    inputs = make_inputs(case, device)
    unseen = torch.ones(case.batch, case.keys, dtype=torch.bool, device=device)
    for b in range(case.batch):
        for t in range(case.tokens):
            if inputs.query_mask[b, t]:
                unseen[b, inputs.key_start[b, t] : inputs.key_end[b, t]] = False
    for tensor in (inputs.k, inputs.k_index):
        tensor[unseen] = torch.nan
    for tensor in (inputs.q, inputs.q_index, inputs.w_index):
        tensor[~inputs.query_mask] = torch.nan
    index = index_tensors(inputs)
    loss = run(case, inputs, index, selected)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, index))


def test_without_gradients(device: str) -> None:
    case = BY_NAME["sinks"]
    inputs = make_inputs(case, device)
    index = index_tensors(inputs)
    with torch.no_grad():
        plain = run(case, inputs, index, selected=False)
    torch.testing.assert_close(plain, run(case, inputs, index, selected=False).detach())


def test_only_the_gradients_that_are_wanted(device: str) -> None:
    case = BY_NAME["one_of_everything"]
    inputs = make_inputs(case, device)
    index = [x.detach() for x in index_tensors(inputs)]
    index[1].requires_grad_()
    run(case, inputs, index, selected=True).backward()
    assert [x.grad is not None for x in index] == [False, True, False]


@both_equations
def test_compiles_into_one_graph(selected: bool, device: str) -> None:
    case = replace(BY_NAME["odd_lengths"], tokens=1, keys=9, batch=1)
    inputs = make_inputs(case, device)
    index = index_tensors(inputs)
    compiled = torch.compile(
        lambda *tensors: run(case, inputs, list(tensors), selected) * 2, fullgraph=True, backend="aot_eager"
    )
    results = [torch.autograd.grad(f(*index), index) for f in (compiled, compiled.__wrapped__)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wanted", [False, True])
def test_is_one_operator(wanted: bool, device: str) -> None:
    case = replace(BY_NAME["odd_lengths"], tokens=1, keys=9, batch=1)
    inputs = make_inputs(case, device)
    index = [x.requires_grad_(wanted) for x in index_tensors(inputs)]
    arguments = (*index, inputs.q, inputs.k, None, None, None, None, inputs.query_mask, wanted, 0.3, 0.2, None, 0, 0)
    torch.library.opcheck(kernels._loss, arguments)


def test_indices_outside_are_skipped_or_found(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(BY_NAME["odd_lengths"], tokens=1, keys=9, batch=1)
    inputs = make_inputs(case, device)
    inputs.indices[..., 1] = -1
    expected = run(case, inputs, index_tensors(inputs), True)
    inputs.indices[..., 1] = 2**30
    assert torch.equal(run(case, inputs, index_tensors(inputs), True), expected)
    monkeypatch.setenv("DSA_CHECK_INDICES", "1")
    with pytest.raises(ValueError, match="indices must lie in"):
        run(case, inputs, index_tensors(inputs), True)
