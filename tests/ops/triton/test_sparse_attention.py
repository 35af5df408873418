"""`sparse_attention` in Triton against attention written row by row, on the shared cases at small sizes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa.ops import sparse_attention
from dsa.ops.sparse_attention import triton as kernels
from dsa.ops.sparse_attention import triton_gradients
from dsa.testing import oracles
from dsa.testing.cases import CASES, Case, Inputs, make_inputs
from dsa.testing.tolerance import assert_within_yardstick

# The interpreter takes about 20 ms a program, and there is one for each token and KV head.
SMALL = [
    replace(case, tokens=min(case.tokens, 2), keys=min(case.keys, 23)) for case in CASES if case.dtype != torch.float64
]
BY_NAME = {case.name: case for case in SMALL}


def tensors_of(inputs: Inputs) -> list[Tensor]:
    return [x for x in (inputs.q, inputs.k, inputs.v, inputs.sink_logits) if x is not None]


def attend(case: Case, inputs: Inputs, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v, sink_logits = (*tensors, None)[:4]
    return sparse_attention(q, k, v, inputs.indices, softcap=case.softcap, sink_logits=sink_logits, impl="triton")


def oracle(case: Case, inputs: Inputs, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v, sink_logits = (*tensors, None)[:4]
    keys = k.shape[1]
    inside = inputs.indices.masked_fill((inputs.indices < 0) | (inputs.indices >= keys), -1)
    positions = oracles.selected_positions(inside)
    return oracles.attention(q, k, v, positions, softcap=case.softcap, sink_logits=sink_logits)


def assert_forward(case: Case, inputs: Inputs, result: tuple[Tensor, Tensor]) -> None:
    tensors = tensors_of(inputs)
    naive, exact = (oracle(case, inputs, [x.detach().to(d) for x in tensors]) for d in (torch.float32, torch.float64))
    for name, actual, n, e in zip(("out", "lse"), result, naive, exact):
        assert_within_yardstick(actual.detach(), n, e, what=name)


def gradients(function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor]) -> list[Tensor]:
    out = function(tensors)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(out)
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in tensors]
    grads = torch.autograd.grad(out, tensors, weights, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, tensors)]


def assert_both(case: Case, inputs: Inputs) -> None:
    """Results and gradients from one forward pass."""
    tensors = tensors_of(inputs)
    forward: list[tuple[Tensor, Tensor]] = []

    def of(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]
        return gradients(lambda leaves: function(case, inputs, leaves)[0], leaves)

    def recorded(*arguments: Any) -> tuple[Tensor, Tensor]:
        forward.append(attend(*arguments))
        return forward[0]

    actual, naive, exact = of(recorded, None), of(oracle, torch.float32), of(oracle, torch.float64)
    assert_forward(case, inputs, forward[0])
    # The upstream gradient, the result in `delta` and, for 16-bit inputs, the probabilities are rounded on the way.
    rounding = 4 * torch.finfo(case.dtype).eps
    for name, x, a, n, e in zip("qkvs", tensors, actual, naive, exact):
        assert a.dtype == x.dtype
        size = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        assert_within_yardstick(a, n + rounding * size, e, factor=3.0, what=f"gradient of {name}")


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_results_and_gradients(case: Case, device: str) -> None:
    inputs = make_inputs(case, device)
    if case.content == "poisoned":
        assert_forward(case, inputs, attend(case, inputs, tensors_of(inputs)))
    else:
        assert_both(case, inputs)


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("name", ["sink_logits", "softcap", "bf16", "more_places_than_keys", "not_finite"])
def test_splits(name: str, splits: int, device: str) -> None:
    """Parts of a selection that are empty, short or all there is."""
    case = replace(BY_NAME[name], batch=1, tokens=2, keys=90, top_k=75)
    inputs = make_inputs(case, device)
    inputs.indices[0, 0, 16:] = -1
    config = {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 4}
    arguments = (inputs.q, inputs.k, inputs.v, inputs.indices, inputs.sink_logits, case.head_dim**-0.5, case.softcap)
    assert_forward(case, inputs, kernels.forward(*arguments, splits=splits, config=config))


@pytest.mark.parametrize("heads", [3, 20])
def test_latent_rows(heads: int, device: str) -> None:
    """MLA: values are the first columns of the keys, heads take more than one block, widths more than one part."""
    case = Case("latent", batch=1, tokens=2, keys=40, heads=heads, groups=1, head_dim=80, value_dim=64, top_k=37)
    inputs = make_inputs(case, device)
    inputs = Inputs(**{**vars(inputs), "v": inputs.k[..., :64]})
    config = {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 4}
    arguments = (inputs.q, inputs.k, inputs.v, inputs.indices, None, case.head_dim**-0.5, None)
    assert kernels.values_in_keys(inputs.k, inputs.v, 512)
    assert_forward(case, inputs, kernels.forward(*arguments, config=config))
    assert_both(case, inputs)
    rows = inputs.k.clone().requires_grad_()
    apart_k, apart_v = inputs.k.clone().requires_grad_(), inputs.v.clone().requires_grad_()
    for k, v in ((rows, rows[..., :64]), (apart_k, apart_v)):
        sparse_attention(inputs.q, k, v, inputs.indices, impl="triton")[0].square().sum().backward()
    expected = apart_k.grad.clone()
    expected[..., :64] += apart_v.grad
    torch.testing.assert_close(rows.grad, expected)


@pytest.mark.parametrize("sizes", [(1, 1), (24, 40), (96, 72), (128, 128), (192, 130)], ids=str)
def test_head_dims(sizes: tuple[int, int], device: str) -> None:
    case = Case("dims", batch=1, tokens=2, keys=19, heads=2, groups=1, head_dim=sizes[0], value_dim=sizes[1])
    inputs = make_inputs(case, device)
    assert_both(case, inputs)


@pytest.mark.parametrize(
    ("what", "heads"),
    [("shared", (1, 1)), ("shared", (16, 2)), ("in_turns", (6, 2)), ("scattered", (4, 1)), ("twice", (4, 1)),
     ("not_finite", (4, 1))],
)  # fmt: skip
def test_neighbours_share_tiles(
    what: str, heads: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of queries over the union of their selections, and the blocks that are left to single queries."""
    monkeypatch.setattr(kernels, "SHARING_ROWS", 1)
    monkeypatch.setattr(kernels, "SHARING_BYTES", 1 if what == "in_turns" else 1 << 20)
    monkeypatch.setattr(kernels, "LONGEST_UNION", 1 if what == "scattered" else 2)
    case = Case(
        "neighbours", batch=2 if what == "in_turns" else 1, tokens=10 if heads == (16, 2) else 3, keys=70,
        heads=heads[0], groups=heads[1], head_dim=24, value_dim=20, top_k=17, dtype=torch.bfloat16, sink=True,
        softcap=3.0,
    )  # fmt: skip
    inputs = make_inputs(case, device)
    if what != "scattered":
        inputs.indices[..., 1:] = torch.arange(3, 51, 3, device=device)
    inputs.indices[..., 0] = 0
    inputs.indices[:, -1, 3] = -1
    if what == "twice":
        inputs.indices[:, 1, 2] = inputs.indices[:, 1, 5]
    if what == "not_finite":
        inputs.v[:, inputs.indices[0, 1, 4], 0, 0] = torch.inf
        inputs.indices[:, 0, 4] = -1
    shared, flagged = kernels._launch_shared, []

    def recorded(*arguments: Any) -> tuple[Tensor, int]:
        flags, queries = shared(*arguments)
        flagged.append(bool(flags.any()))
        return flags, queries

    monkeypatch.setattr(kernels, "_launch_shared", recorded)
    assert_forward(case, inputs, attend(case, inputs, tensors_of(inputs)))
    assert flagged == [what in ("scattered", "twice", "not_finite")]


def test_indices_out_of_range_are_never_read(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["odd_lengths"]
    inputs = make_inputs(case, device)
    inputs.indices[:, :, :3] = torch.tensor([case.keys, 2**31 - 1, -(2**31)], dtype=torch.int32)
    assert_both(case, inputs)
    monkeypatch.setenv("DSA_CHECK_INDICES", "1")
    with pytest.raises(ValueError, match="indices must lie in"):
        attend(case, inputs, tensors_of(inputs))


def test_long_indices_and_empty_rows(device: str) -> None:
    case = BY_NAME["sink_logits"]
    inputs = make_inputs(case, device)
    inputs.indices[0, 1] = -1
    wide = Inputs(**{**vars(inputs), "indices": inputs.indices.long()})
    out, lse = attend(case, wide, tensors_of(wide))
    assert_forward(case, inputs, (out, lse))
    assert not out[0, 1].any()
    assert lse[0, 1].eq(-torch.inf).all()


def test_padding_never_reads_row_zero(device: str) -> None:
    case = BY_NAME["odd_lengths"]
    inputs = make_inputs(case, device)
    inputs.indices[inputs.indices == 0] = -1
    clean, _ = attend(case, inputs, tensors_of(inputs))
    inputs.k[:, 0], inputs.v[:, 0] = torch.nan, torch.inf
    assert torch.equal(attend(case, inputs, tensors_of(inputs))[0], clean)


@pytest.mark.parametrize("scratch", [1, 4000, 1 << 30])
@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_in_turns(scratch: int, deterministic: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded memory, with and without the fixed order; several programs add to every key."""
    monkeypatch.setattr(triton_gradients, "SCRATCH_BYTES", scratch)
    case = Case("turns", batch=2, tokens=3, keys=6, heads=6, groups=2, head_dim=20, value_dim=17, top_k=5)
    inputs = make_inputs(case, device)
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert_both(case, inputs)
    finally:
        torch.use_deterministic_algorithms(False)


def test_only_the_gradients_that_are_wanted(device: str) -> None:
    case = BY_NAME["one_of_everything"]
    for which in range(3):
        inputs = make_inputs(case, device)
        tensors = tensors_of(inputs)
        tensors[which].requires_grad_()
        attend(case, inputs, tensors)[0].sum().backward()
        assert [x.grad is not None for x in tensors] == [i == which for i in range(3)]


def test_lse_has_no_gradient_and_second_derivatives_are_refused(device: str) -> None:
    case = BY_NAME["one_of_everything"]
    inputs = make_inputs(case, device)
    out, lse = attend(case, inputs, [inputs.q.requires_grad_(), inputs.k, inputs.v])
    assert not lse.requires_grad
    (grad,) = torch.autograd.grad(out.square().sum(), inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["one_of_everything", "sink_logits"])
def test_operator_is_registered_properly(name: str, device: str) -> None:
    case = replace(BY_NAME[name], batch=1, tokens=1)
    inputs = make_inputs(case, device)
    tensors = [x.requires_grad_() for x in tensors_of(inputs)]
    q, k, v, sink_logits = (*tensors, None)[:4]
    torch.library.opcheck(kernels._forward, (q, k, v, inputs.indices, sink_logits, 0.3, case.softcap))


def test_compiles_into_one_graph(device: str) -> None:
    case = BY_NAME["one_of_everything"]
    inputs = make_inputs(case, device)
    compiled = torch.compile(
        lambda *tensors: attend(case, inputs, list(tensors))[0].square().sum(), fullgraph=True, backend="aot_eager"
    )
    grads = []
    for function in (compiled, compiled.__wrapped__):
        q = inputs.q.clone().requires_grad_()
        function(q, inputs.k, inputs.v).backward()
        grads.append(q.grad)
    torch.testing.assert_close(*grads)


def test_gaps_say_why(device: str) -> None:
    inputs = make_inputs(replace(BY_NAME["odd_lengths"], dtype=torch.float64), device)
    with pytest.raises(NotImplementedError, match="fp64 has no Triton kernel"):
        attend(BY_NAME["odd_lengths"], inputs, tensors_of(inputs))
