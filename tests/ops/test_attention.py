"""`sparse_attention` and `dense_attention`: results and gradients against attention written row by row."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsa.ops import dense_attention, sparse_attention
from dsa.testing import oracles
from dsa.testing.cases import CASES, EDGES, IMPLEMENTATIONS, Case, Inputs, make_inputs
from dsa.testing.tolerance import assert_within_yardstick

BY_NAME = {case.name: case for case in CASES}
OPERATIONS = {
    "sparse_attention": lambda inputs, tensors, **options: sparse_attention(
        *tensors[:3], inputs.indices, sink_logits=tensors[3], **options
    ),
    "dense_attention": lambda inputs, tensors, **options: dense_attention(
        *tensors[:3], sink_logits=tensors[3], key_start=inputs.key_start, key_end=inputs.key_end, **options
    ),
}
RUNS = [(operation, impl) for operation in OPERATIONS for impl in IMPLEMENTATIONS[operation]]
# What an implementation computes in at best: the CPU kernels know no fp64.
WIDEST = {"native": torch.float32}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def read_positions(case: Case, inputs: Inputs, operation: str) -> oracles.Positions:
    if operation == "sparse_attention":
        return oracles.selected_positions(inputs.indices)
    return oracles.visible_positions(inputs.key_start, inputs.key_end, case.batch, case.tokens, case.keys)


def tensors_of(inputs: Inputs) -> list[Tensor | None]:
    return [inputs.q, inputs.k, inputs.v, inputs.sink_logits]


def converted(tensors: list[Tensor | None], dtype: torch.dtype, grad: bool = False) -> list[Tensor | None]:
    return [None if x is None else x.detach().to(dtype).requires_grad_(grad) for x in tensors]


def gradients(function: Callable[[list[Tensor | None]], Tensor], tensors: list[Tensor | None]) -> list[Tensor]:
    """Gradients of a fixed weighting of the result, in the order of the tensors that are there."""
    out = function(tensors)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    wanted = [x for x in tensors if x is not None]
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in wanted]
    grads = torch.autograd.grad(out, wanted, weights, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, wanted)]


@every_case
def test_forward(case: Case, operation: str, impl: str) -> None:
    inputs = make_inputs(case)
    tensors = tensors_of(inputs)
    positions = read_positions(case, inputs, operation)
    out, lse = OPERATIONS[operation](inputs, tensors, softcap=case.softcap, impl=impl)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert out.dtype == case.dtype
    assert lse.dtype == wide

    def oracle(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q, k, v, sink = converted(tensors, dtype)
        return oracles.attention(q, k, v, positions, softcap=case.softcap, sink_logits=sink)

    for name, actual, naive, exact in zip(("out", "lse"), (out, lse), oracle(wide), oracle(torch.float64)):
        assert_within_yardstick(actual, naive, exact, what=name)


@pytest.mark.parametrize("case", [c for c in CASES if c.content != "poisoned"], ids=lambda case: case.name)
def test_backward(case: Case, operation: str, impl: str) -> None:
    inputs = make_inputs(case)
    positions = read_positions(case, inputs, operation)
    tensors = [None if x is None else x.clone().requires_grad_() for x in tensors_of(inputs)]
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32

    def run(tensors: list[Tensor | None]) -> Tensor:
        return OPERATIONS[operation](inputs, tensors, softcap=case.softcap, impl=impl)[0]

    def oracle(tensors: list[Tensor | None]) -> Tensor:
        q, k, v, sink = tensors
        return oracles.attention(q, k, v, positions, softcap=case.softcap, sink_logits=sink)[0]

    actual = gradients(run, tensors)
    naive = gradients(oracle, converted(tensors, wide, grad=True))
    exact = gradients(oracle, converted(tensors, torch.float64, grad=True))
    # The upstream gradient is rounded to the dtype of the result before it comes back.
    rounding = 0.0 if case.dtype == wide else torch.finfo(case.dtype).eps
    for name, x, a, n, e in zip(
        ("q", "k", "v", "sink_logits"), (t for t in tensors if t is not None), actual, naive, exact
    ):
        assert a.dtype == x.dtype
        if rounding and e.numel():
            n = e + rounding * e.abs().max()
        assert_within_yardstick(a, n, e, factor=3.0, what=f"gradient of {name}")


@pytest.mark.parametrize("name", ["odd_lengths", "scattered_queries", "softcap_and_sink_logits", "wide_values"])
def test_gradcheck(name: str, operation: str, impl: str) -> None:
    if impl in WIDEST:
        pytest.skip("finite differences need fp64")
    case = BY_NAME[name]
    inputs = make_inputs(
        Case(
            "small",
            tokens=5,
            keys=7,
            top_k=4,
            heads=4,
            groups=2,
            head_dim=3,
            value_dim=2,
            ranges=case.ranges,
            softcap=case.softcap,
            sink=case.sink,
            dtype=torch.float64,
        )
    )
    tensors = tensors_of(inputs)
    present = [x.requires_grad_() for x in tensors if x is not None]

    def run(*present: Tensor) -> Tensor:
        given = (*present, None)[:4]
        return OPERATIONS[operation](inputs, given, softcap=case.softcap, impl=impl)[0]

    assert torch.autograd.gradcheck(run, present, atol=1e-8, rtol=1e-6)


@every_case
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.usefixtures("tiny_blocks")
def test_blocks_do_not_matter(case: Case, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(case)
    tensors = [None if x is None else x.clone().requires_grad_() for x in tensors_of(inputs)]

    def run(tensors: list[Tensor | None]) -> Tensor:
        return OPERATIONS[operation](inputs, tensors, softcap=case.softcap, impl="reference")[0]

    grads = gradients(run, tensors)
    out, lse = OPERATIONS[operation](inputs, tensors, softcap=case.softcap, impl="reference")
    monkeypatch.undo()
    whole, whole_lse = OPERATIONS[operation](inputs, tensors, softcap=case.softcap, impl="reference")
    eps = 8 * torch.finfo(case.dtype).eps
    torch.testing.assert_close(out, whole, atol=eps, rtol=eps, equal_nan=True)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5, equal_nan=True)
    if case.content != "poisoned":
        for grad, whole_grad in zip(grads, gradients(run, tensors)):
            scale = whole_grad.abs().max().item() if whole_grad.numel() else 0.0
            torch.testing.assert_close(grad, whole_grad, atol=32 * torch.finfo(grad.dtype).eps * scale, rtol=2 * eps)


def test_latent_views(operation: str, impl: str) -> None:
    """MLA: values are the first dims of the keys, as a view, with one KV head."""
    generator = torch.Generator().manual_seed(11)
    dtype = WIDEST.get(impl, torch.float64)
    q = torch.randn(1, 5, 4, 12, dtype=dtype, generator=generator)
    rows = torch.randn(1, 9, 1, 12, dtype=dtype, generator=generator)
    inputs = make_inputs(Case("latent", batch=1, tokens=5, keys=9))

    def run(rows: Tensor, v: Tensor) -> Tensor:
        return OPERATIONS[operation](inputs, (q, rows, v, None), impl=impl)[0]

    shared, separate = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    values = rows[..., :8].clone().requires_grad_()
    out, apart = run(shared, shared[..., :8]), run(separate, values)
    torch.testing.assert_close(out, apart)
    out.square().sum().backward()
    apart.square().sum().backward()
    expected = separate.grad.clone()
    expected[..., :8] += values.grad
    torch.testing.assert_close(shared.grad, expected)


def test_lse_is_without_the_sink_and_has_no_gradient(operation: str, impl: str) -> None:
    inputs = make_inputs(BY_NAME["sink_logits"])
    tensors = [x.requires_grad_() for x in tensors_of(inputs)]
    out, lse = OPERATIONS[operation](inputs, tensors, impl=impl)
    assert out.requires_grad
    assert not lse.requires_grad
    without, lse_without = OPERATIONS[operation](inputs, [*tensors[:3], None], impl=impl)
    assert torch.equal(lse, lse_without)
    share = torch.sigmoid(lse - tensors[3])
    torch.testing.assert_close(out, without * share.unsqueeze(-1), atol=1e-5, rtol=1e-5)


def test_a_second_derivative_is_refused(operation: str, impl: str) -> None:
    inputs = make_inputs(BY_NAME["odd_lengths"])
    tensors = [inputs.q.requires_grad_(), inputs.k, inputs.v, None]
    out, _ = OPERATIONS[operation](inputs, tensors, impl=impl)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_the_gradients_that_are_wanted(which: int, operation: str, impl: str) -> None:
    inputs = make_inputs(BY_NAME["odd_lengths"])
    tensors = tensors_of(inputs)
    tensors[which].requires_grad_()
    OPERATIONS[operation](inputs, tensors, impl=impl)[0].sum().backward()
    assert [x is not None and x.grad is not None for x in tensors] == [i == which for i in range(4)]


def test_unseen_keys_never_matter(operation: str, impl: str) -> None:
    """NaN in a key or value reaches exactly the queries that read it, in results and gradients."""
    case = Case("poison", batch=1, tokens=6, keys=9, dtype=WIDEST.get(impl, torch.float64))
    inputs = make_inputs(case)
    inputs.indices[inputs.indices == 7] = -1
    inputs.indices[0, 2, 0] = 7
    end = torch.tensor([[3, 5, 8, 7, 2, 0]], dtype=torch.int32)
    inputs = Inputs(**{**vars(inputs), "key_end": end})
    clean = [None if x is None else x.clone().requires_grad_() for x in tensors_of(inputs)]
    dirty = [None if x is None else x.clone() for x in tensors_of(inputs)]
    dirty[1][0, 7:], dirty[2][0, 7:] = torch.nan, torch.inf
    if operation == "sparse_attention":
        inputs.indices[inputs.indices == 8] = -1
    dirty = [None if x is None else x.requires_grad_() for x in dirty]
    expected, actual = (OPERATIONS[operation](inputs, x, impl=impl)[0] for x in (clean, dirty))
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(actual[:, others], expected[:, others])
    assert actual[:, 2].isnan().all()
    actual[:, others].sum().backward()
    expected[:, others].sum().backward()
    torch.testing.assert_close(dirty[0].grad[:, others], clean[0].grad[:, others])


@pytest.mark.parametrize("sink", [*EDGES, 1e30, -1e30, -torch.inf, torch.inf, torch.nan])
def test_nothing_that_is_seen_gives_zeros_whatever_the_sink(sink: float, operation: str, impl: str) -> None:
    """The exponential of a sink of -100 is subnormal in fp32, and the reciprocal of that infinite."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 1, 1, 16, generator=generator).requires_grad_() for _ in range(3))
    logits = torch.tensor([sink], requires_grad=True)
    if operation == "dense_attention":
        nothing = torch.tensor([[0]])
        out, lse = dense_attention(q, k, v, sink_logits=logits, key_end=nothing, impl=impl)
    else:
        nothing = torch.tensor([[[-1, -1]]])
        out, lse = sparse_attention(q, k, v, nothing, sink_logits=logits, impl=impl)
    assert (out == 0).all()
    assert lse.item() == -torch.inf
    # The gradient of a sink that is NaN or infinite is no number, and may reach others as 0 * NaN.
    if abs(sink) < torch.inf:
        out.sum().backward()
        assert all((x.grad == 0).all() for x in (q, k, v, logits))


def test_padding_never_reads_row_zero() -> None:
    inputs = make_inputs(BY_NAME["odd_lengths"])
    inputs.indices[inputs.indices == 0] = -1
    clean = sparse_attention(inputs.q, inputs.k, inputs.v, inputs.indices)[0]
    inputs.k[:, 0], inputs.v[:, 0] = torch.nan, torch.inf
    assert torch.equal(sparse_attention(inputs.q, inputs.k, inputs.v, inputs.indices)[0], clean)


def test_each_occurrence_of_an_index_counts() -> None:
    inputs = make_inputs(BY_NAME["odd_lengths"])
    twice = torch.cat((inputs.indices, inputs.indices[..., :2]), dim=-1)
    positions = oracles.selected_positions(twice)
    exact, _ = oracles.attention(inputs.q.double(), inputs.k.double(), inputs.v.double(), positions)
    torch.testing.assert_close(sparse_attention(inputs.q, inputs.k, inputs.v, twice)[0], exact.float())


def test_order_of_a_selection_hardly_matters() -> None:
    inputs = make_inputs(BY_NAME["odd_lengths"])
    out, lse = sparse_attention(inputs.q, inputs.k, inputs.v, inputs.indices)
    back, back_lse = sparse_attention(inputs.q, inputs.k, inputs.v, inputs.indices.flip(-1).long())
    torch.testing.assert_close(out, back)
    torch.testing.assert_close(lse, back_lse)


def test_everything_selected_is_dense_attention() -> None:
    inputs = make_inputs(BY_NAME["multi_query"])
    keys = inputs.k.shape[1]
    everything = torch.arange(keys).expand(2, keys, keys)
    causal = everything.masked_fill(everything > torch.arange(keys)[:, None], -1)
    sparse = sparse_attention(inputs.q, inputs.k, inputs.v, causal)
    for a, b in zip(sparse, dense_attention(inputs.q, inputs.k, inputs.v)):
        torch.testing.assert_close(a, b)


def test_dense_agrees_with_torch() -> None:
    inputs = make_inputs(BY_NAME["odd_lengths"])
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(dense_attention(inputs.q, inputs.k, inputs.v)[0], theirs.transpose(1, 2))


def test_autocast_does_not_narrow(operation: str, impl: str) -> None:
    inputs = make_inputs(BY_NAME["odd_lengths"])
    tensors = [None if x is None else x.requires_grad_() for x in tensors_of(inputs)]
    out = OPERATIONS[operation](inputs, tensors, impl=impl)[0]
    expected = torch.autograd.grad(out.sum(), tensors[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = OPERATIONS[operation](inputs, tensors, impl=impl)[0]
        actual = torch.autograd.grad(again.sum(), tensors[:3])
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@given(data=st.data())
def test_any_shape_and_range(data: st.DataObject) -> None:
    groups, shared = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    case = Case(
        f"drawn_{data.draw(st.integers(0, 1 << 20))}",
        batch=data.draw(st.integers(1, 2)), tokens=data.draw(st.integers(1, 6)), keys=data.draw(st.integers(0, 15)),
        heads=groups * shared, groups=groups, head_dim=data.draw(st.integers(1, 5)),
        value_dim=data.draw(st.integers(1, 5)), top_k=data.draw(st.integers(1, 20)), dtype=torch.float64,
        ranges=data.draw(st.sampled_from([c.ranges for c in CASES])), softcap=data.draw(st.sampled_from([None, 1.0])),
        sink=data.draw(st.booleans()),
    )  # fmt: skip
    inputs = make_inputs(case)
    q, k, v, sink = tensors_of(inputs)
    for operation, impl in RUNS:
        tensors = converted([q, k, v, sink], WIDEST.get(impl, torch.float64))
        actual = OPERATIONS[operation](inputs, tensors, softcap=case.softcap, impl=impl)
        positions = read_positions(case, inputs, operation)
        expected = oracles.attention(q, k, v, positions, softcap=case.softcap, sink_logits=sink)
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b.to(a.dtype))
