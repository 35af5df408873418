"""`indexer_loss`: value and gradients against the divergence written row by row."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsa.ops import index_topk, indexer_loss, native_support
from dsa.testing import oracles
from dsa.testing.cases import CASES, IMPLEMENTATIONS, Case, Inputs, make_inputs, scattered
from dsa.testing.tolerance import assert_within_yardstick

OPERATIONS = ("indexer_loss",)
FINITE = [case for case in CASES if case.content != "poisoned"]
BY_NAME = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", FINITE, ids=lambda case: case.name)
both_equations = pytest.mark.parametrize("selected", [False, True], ids=["all_visible", "selected"])


def skip_without_fp64(impl: str) -> None:
    if impl == "native":
        pytest.skip("the CPU kernels do not compute in fp64; test_errors.py asks for the message")


def run(case: Case, inputs: Inputs, index: list[Tensor], selected: bool, masked: bool, impl: str = "auto") -> Tensor:
    return indexer_loss(
        *index,
        inputs.q,
        inputs.k,
        indices=inputs.indices if selected else None,
        key_start=inputs.key_start,
        key_end=inputs.key_end,
        query_mask=inputs.query_mask if masked else None,
        sinks=case.sinks,
        local=case.local,
        softcap=case.softcap,
        sink_logits=inputs.sink_logits,
        impl=impl,
    )


def oracle(case: Case, inputs: Inputs, index: list[Tensor], selected: bool, masked: bool) -> Tensor:
    read = oracles.visible_positions(inputs.key_start, inputs.key_end, case.batch, case.tokens, case.keys)
    kept = oracles.without_always_read(read, case.sinks, case.local)
    if selected:
        chosen = oracles.selected_positions(inputs.indices)
        read = [[[s for s in row if s in set(seen)] for row, seen in zip(*rows)] for rows in zip(chosen, read)]
    return oracles.indexer_loss(
        *index,
        inputs.q.double(),
        inputs.k.double(),
        read,
        kept,
        query_mask=inputs.query_mask if masked else None,
        softcap=case.softcap,
        sink_logits=inputs.sink_logits,
    )


def index_tensors(inputs: Inputs, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [
        x.detach().to(dtype or x.dtype).clone().requires_grad_()
        for x in (inputs.q_index, inputs.k_index, inputs.w_index)
    ]


def gradients(loss: Tensor, index: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(loss, index, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, index)]


@both_equations
@every_case
def test_value_and_gradients(case: Case, selected: bool, impl: str) -> None:
    inputs = make_inputs(case)
    masked = "padding" in case.name
    index = index_tensors(inputs)
    loss = run(case, inputs, index, selected, masked, impl)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert loss.dtype == wide
    assert loss.shape == ()
    results = []
    for dtype in (wide, torch.float64):
        given = index_tensors(inputs, dtype)
        value = oracle(case, inputs, given, selected, masked)
        results.append([value.detach(), *gradients(value, given)])
    actual = [loss.detach(), *gradients(loss, index)]
    for name, a, naive, exact in zip(("loss", "q_index", "k_index", "w_index"), actual, *results):
        # A difference of sums over positions: what cancels is about 1, however small the loss.
        naive = naive + torch.finfo(wide).eps
        assert_within_yardstick(a, naive, exact, factor=8.0, what=name)
    for x, grad in zip(index, actual[1:]):
        assert grad.dtype == x.dtype


@both_equations
@every_case
def test_fp64_agrees_with_autograd_to_one_in_a_million(case: Case, selected: bool, impl: str) -> None:
    skip_without_fp64(impl)
    inputs = make_inputs(case)
    masked = "padding" in case.name
    index, naive = index_tensors(inputs, torch.float64), index_tensors(inputs, torch.float64)
    loss, expected = run(case, inputs, index, selected, masked, impl), oracle(case, inputs, naive, selected, masked)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-12)
    for grad, wanted in zip(gradients(loss, index), gradients(expected, naive)):
        torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-10)


@both_equations
@pytest.mark.parametrize("name", ["odd_lengths", "sinks_and_local_scattered", "softcap_and_sink_logits"])
def test_gradcheck(name: str, selected: bool, impl: str) -> None:
    skip_without_fp64(impl)
    of = BY_NAME[name]
    case = Case(
        "small_loss", batch=1, tokens=4, keys=6, top_k=6, heads=4, groups=2, head_dim=3, index_heads=2, index_dim=3,
        ranges=of.ranges, softcap=of.softcap, sink=of.sink, sinks=min(1, of.sinks), local=min(1, of.local),
        dtype=torch.float64,
    )  # fmt: skip
    inputs = make_inputs(case)
    index = index_tensors(inputs)
    assert torch.autograd.gradcheck(
        lambda *index: run(case, inputs, list(index), selected, masked=True, impl=impl), index, atol=1e-8, rtol=1e-6
    )


@both_equations
@every_case
@pytest.mark.usefixtures("tiny_blocks")
def test_blocks_do_not_matter(case: Case, selected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(case)
    index = index_tensors(inputs)
    loss = run(case, inputs, index, selected, masked=False, impl="reference")
    grads = gradients(loss, index)
    monkeypatch.undo()
    whole = run(case, inputs, index, selected, masked=False, impl="reference")
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    for grad, expected in zip(grads, gradients(whole, index)):
        eps = 16 * torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad, expected, rtol=eps, atol=eps)


@both_equations
def test_a_perfect_indexer_has_no_loss(selected: bool, impl: str) -> None:
    """One head of attention with positive logits, imitated exactly."""
    skip_without_fp64(impl)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.rand(1, 11, 1, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    indices = torch.arange(11)[None, None].expand(1, 11, 11) if selected else None
    index = [q, k[:, :, 0], torch.ones(1, 11, 1, dtype=torch.float64)]
    assert abs(indexer_loss(*index, q, k, indices=indices, impl=impl).item()) < 1e-12
    other = indexer_loss(*index, q, k, indices=indices, index_scale=0.5, attention_scale=2.0, impl=impl)
    assert other.item() > 1e-3


def test_all_visible_selected_is_the_loss_over_all(impl: str) -> None:
    case = BY_NAME["sinks_and_local"]
    inputs = make_inputs(case)
    index = index_tensors(inputs)
    everything = index_topk(
        *index, case.keys, key_start=inputs.key_start, key_end=inputs.key_end, sinks=case.sinks, local=case.local
    )
    inputs = Inputs(**{**vars(inputs), "indices": everything})
    a, b = (run(case, inputs, index, selected, masked=True, impl=impl) for selected in (False, True))
    torch.testing.assert_close(a, b)
    for x, y in zip(gradients(a, index), gradients(b, index)):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


def test_left_out_tokens_do_not_matter(impl: str) -> None:
    """Index keys of sinks and local tokens, whatever they hold, change nothing; masked queries neither."""
    inputs = make_inputs(Case("left_out", batch=1, tokens=9, keys=30, sinks=2, local=3))
    case = Case("left_out", batch=1, tokens=9, keys=30, sinks=2, local=3)
    end = torch.full((1, 9), 30, dtype=torch.int32)
    inputs = Inputs(**{**vars(inputs), "key_end": end})
    clean = index_tensors(inputs)
    expected = run(case, inputs, clean, False, masked=True, impl=impl)
    with torch.no_grad():
        dirty = [x.clone() for x in clean]
        dirty[1][:, :2], dirty[1][:, 27:] = torch.nan, torch.inf
        dirty[0][~inputs.query_mask], dirty[2][~inputs.query_mask] = torch.nan, torch.nan
        inputs.q[~inputs.query_mask] = torch.nan
    dirty = [x.requires_grad_() for x in dirty]
    actual = run(case, inputs, dirty, False, masked=True, impl=impl)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(gradients(actual, dirty), gradients(expected, clean)):
        torch.testing.assert_close(a, b)


@both_equations
def test_unseen_memory_does_not_matter(selected: bool, impl: str) -> None:
    case = Case("unseen", batch=2, tokens=6, keys=20)
    inputs = make_inputs(case)
    end = torch.tensor([[3, 9, 4, 5, 0, 7], [11, 12, 12, 3, 4, 5]], dtype=torch.int32)
    inputs = Inputs(**{**vars(inputs), "key_end": end})
    clean = index_tensors(inputs)
    expected = run(case, inputs, clean, selected, masked=False, impl=impl)
    dirty = [x.detach().clone() for x in clean]
    inputs.k[0, 9:], inputs.k[1, 12:] = torch.nan, torch.nan
    dirty[1][0, 9:], dirty[1][1, 12:] = torch.nan, torch.inf
    dirty = [x.requires_grad_() for x in dirty]
    actual = run(case, inputs, dirty, selected, masked=False, impl=impl)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(gradients(actual, dirty), gradients(expected, clean)):
        torch.testing.assert_close(a, b)


@both_equations
def test_what_is_not_a_number_reaches_the_loss(selected: bool, impl: str) -> None:
    case = BY_NAME["odd_lengths"]
    for name in ("q", "k", "q_index", "w_index"):
        inputs = make_inputs(case)
        getattr(inputs, name)[:] = torch.nan
        assert run(case, inputs, index_tensors(inputs), selected, masked=False, impl=impl).isnan(), name


@both_equations
def test_mass_that_underflows_leaves_nothing_to_compare(selected: bool, impl: str) -> None:
    case = Case("underflow", batch=1, tokens=1, keys=6, heads=1, groups=1, head_dim=1, local=1)
    inputs = make_inputs(case)
    inputs.q[:], inputs.k[:] = 1.0, -1000.0
    inputs.k[:, -1] = 0.0
    inputs.indices[:] = torch.tensor([0, 1, 2, 3, 4, 5, -1])
    index = index_tensors(inputs)
    loss = run(case, inputs, index, selected, masked=False, impl=impl)
    assert loss == 0
    assert all((grad == 0).all() for grad in gradients(loss, index))


def test_a_subset_of_queries_is_part_of_the_mean(impl: str) -> None:
    """The mean over all queries is the mean of two random halves, each given by its ranges."""
    skip_without_fp64(impl)
    case = Case("subset", batch=1, tokens=20, keys=20, sinks=1, local=2, dtype=torch.float64)
    inputs = make_inputs(case)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0)) + 3
    ends = (torch.arange(20) + 1).int()

    def loss(rows: Tensor) -> Tensor:
        index = inputs.q_index[:, rows], inputs.k_index, inputs.w_index[:, rows]
        return indexer_loss(*index, inputs.q[:, rows], inputs.k, key_end=ends[rows][None], sinks=1, local=2, impl=impl)

    whole = loss(torch.arange(20))
    torch.testing.assert_close((loss(order[:8]) * 8 + loss(order[8:]) * 9) / 17, whole)


def test_only_the_index_tensors_get_gradients(impl: str) -> None:
    inputs = make_inputs(BY_NAME["sink_logits"])
    index = index_tensors(inputs)
    others = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.sink_logits)]
    run(BY_NAME["sink_logits"], inputs, index, False, masked=False, impl=impl).backward()
    assert all(x.grad is not None for x in index)
    assert all(x.grad is None for x in others)
    plain = [x.detach() for x in index]
    assert not run(BY_NAME["sink_logits"], inputs, plain, False, masked=False, impl=impl).requires_grad


def test_only_the_gradients_that_are_wanted(impl: str) -> None:
    inputs = make_inputs(BY_NAME["odd_lengths"])
    whole = index_tensors(inputs)
    run(BY_NAME["odd_lengths"], inputs, whole, False, masked=False, impl=impl).backward()
    for wanted in range(3):
        index = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(index_tensors(inputs))]
        run(BY_NAME["odd_lengths"], inputs, index, False, masked=False, impl=impl).backward()
        assert [x.grad is not None for x in index] == [i == wanted for i in range(3)]
        torch.testing.assert_close(index[wanted].grad, whole[wanted].grad)


def test_a_second_derivative_is_refused(impl: str) -> None:
    inputs = make_inputs(BY_NAME["odd_lengths"])
    index = index_tensors(inputs)
    loss = run(BY_NAME["odd_lengths"], inputs, index, False, masked=False, impl=impl)
    (grad,) = torch.autograd.grad(loss * loss, index[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_does_not_narrow(impl: str) -> None:
    inputs = make_inputs(BY_NAME["odd_lengths"])
    index = index_tensors(inputs)
    expected = run(BY_NAME["odd_lengths"], inputs, index, False, masked=False, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(BY_NAME["odd_lengths"], inputs, index, False, masked=False, impl=impl), expected)


def test_training_lowers_the_loss(impl: str) -> None:
    inputs = make_inputs(Case("trained", batch=1, tokens=40, keys=40, index_heads=3))
    index = index_tensors(inputs)
    optimizer = torch.optim.AdamW(index, lr=0.05)
    losses = []
    for _ in range(60):
        loss = indexer_loss(*index, inputs.q, inputs.k, impl=impl)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@given(data=st.data())
def test_any_shape_and_range(data: st.DataObject) -> None:
    groups, shared = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    case = Case(
        f"drawn_{data.draw(st.integers(0, 1 << 20))}",
        batch=data.draw(st.integers(1, 2)), tokens=data.draw(st.integers(1, 6)), keys=data.draw(st.integers(0, 15)),
        heads=groups * shared, groups=groups, head_dim=data.draw(st.integers(1, 5)), dtype=torch.float64,
        index_heads=data.draw(st.integers(1, 3)), index_dim=data.draw(st.integers(1, 5)),
        top_k=data.draw(st.integers(1, 20)), sinks=data.draw(st.integers(0, 4)), local=data.draw(st.integers(0, 4)),
        ranges=data.draw(st.sampled_from([c.ranges for c in CASES])), sink=data.draw(st.booleans()),
    )  # fmt: skip
    selected, masked = data.draw(st.booleans()), data.draw(st.booleans())
    for impl in IMPLEMENTATIONS["indexer_loss"]:
        if impl == "native" and native_support.missing():
            continue
        single = impl == "native"
        inputs = make_inputs(dataclasses.replace(case, dtype=torch.float32) if single else case)
        index, naive = index_tensors(inputs), index_tensors(inputs, torch.float64)
        loss = run(case, inputs, index, selected, masked, impl)
        expected = oracle(case, inputs, naive, selected, masked)
        limits = {"rtol": 1e-4, "atol": 1e-5} if single else {"rtol": 1e-7, "atol": 1e-7}
        torch.testing.assert_close(loss.double(), expected, **limits)
        for grad, wanted in zip(gradients(loss, index), gradients(expected, naive)):
            torch.testing.assert_close(grad.double(), wanted, **limits)


@both_equations
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (8, 1)], ids=["one_each", "three_each", "one_group"])
@pytest.mark.skipif(native_support.missing() is not None, reason="there are no compiled kernels")
def test_long_rows_on_any_number_of_threads(heads: tuple[int, int], selected: bool) -> None:
    """Several chunks of keys and blocks of queries: near fp64, and the same bits with one thread and with three."""
    case = Case(
        "long_rows", batch=2, tokens=41, keys=1100, heads=heads[0], groups=heads[1], head_dim=24, index_dim=20,
        top_k=300, sinks=4, local=100, ranges=scattered, softcap=30.0, sink=True,
    )  # fmt: skip
    inputs = make_inputs(case)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        index = index_tensors(inputs)
        loss = run(case, inputs, index, selected, True, "native")
        results.append([loss.detach(), *gradients(loss, index)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    wide = index_tensors(inputs, torch.float64)
    loss = run(case, inputs, wide, selected, True, "reference")
    for a, b in zip(results[0], [loss.detach(), *gradients(loss, wide)]):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
