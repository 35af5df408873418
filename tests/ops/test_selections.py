"""Operations over several selections of each query: each is what the operation gives for its heads alone."""

import pytest
import torch
from torch import Tensor

from dsa.ops import index_topk, indexer_loss, native_support, quantize_index_keys, sparse_attention
from dsa.ops.packed_latents import pack_latents
from dsa.ops.quantize import quantize_index_queries
from dsa.testing import oracles
from dsa.testing.cases import SELECTION_CASES, Case, Inputs, make_inputs
from dsa.testing.tolerance import assert_within_yardstick

OPERATIONS = ("index_topk",)
FINITE = [case for case in SELECTION_CASES if case.content != "poisoned"]
every_case = pytest.mark.parametrize("case", SELECTION_CASES, ids=lambda case: case.name)


def select(case: Case, inputs: Inputs, keys: object, weights: Tensor, impl: str) -> Tensor:
    return index_topk(
        inputs.q_index, keys, weights, case.top_k, sinks=case.sinks, local=case.local, key_start=inputs.key_start,
        key_end=inputs.key_end, impl=impl,
    )  # fmt: skip


def part_of(inputs: Inputs, selection: int, selections: int) -> list[Tensor | None]:
    """`q, k, v` and the sinks of the heads of one selection, copied."""
    tensors = (inputs.q, inputs.k, inputs.v)
    parts: list[Tensor | None] = [
        x.reshape(*x.shape[:2], selections, x.shape[2] // selections, x.shape[3])[:, :, selection].clone()
        for x in tensors
    ]
    sinks = inputs.sink_logits
    return [*parts, None if sinks is None else sinks.reshape(selections, -1)[selection].clone()]


@every_case
def test_each_selection_is_that_of_its_weights(case: Case, impl: str) -> None:
    inputs = make_inputs(case)
    for keys in (inputs.k_index, quantize_index_keys(inputs.k_index), quantize_index_keys(inputs.k_index, "fp8")):
        selection = select(case, inputs, keys, inputs.w_index, impl)
        assert selection.shape == (case.batch, case.tokens, case.selections, case.top_k)
        for part, weights in enumerate(inputs.w_index.unbind(2)):
            assert torch.equal(selection[:, :, part], select(case, inputs, keys, weights, impl))


@every_case
def test_int8_selections_are_exactly_those_of_the_documented_scores(case: Case, impl: str) -> None:
    inputs = make_inputs(case)
    keys = quantize_index_keys(inputs.k_index)
    query, query_scale = quantize_index_queries(inputs.q_index)
    visible = oracles.visible_positions(inputs.key_start, inputs.key_end, case.batch, case.tokens, case.keys)
    selection = select(case, inputs, keys, inputs.w_index, impl)
    for part, weights in enumerate(inputs.w_index.unbind(2)):
        scores = oracles.int8_index_scores(query, query_scale, keys.data, keys.scale, weights, case.index_dim**-0.5)
        expected = oracles.select(scores, visible, case.top_k, case.sinks, case.local)
        assert torch.equal(selection[:, :, part], expected)


@pytest.mark.skipif(native_support.missing() is not None, reason="the kernels were not built")
@pytest.mark.parametrize("tokens", [1, 24, 1600])
@pytest.mark.parametrize("form", ["int8", "fp32"])
def test_guesses_and_bounds_leave_every_selection_alone(tokens: int, form: str) -> None:
    """With many queries chunks are left out that cannot matter to any of the selections."""
    keys, dim = 12_000, 32
    generator = torch.Generator().manual_seed(tokens)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    shrink = torch.cat([torch.ones(5), torch.full((dim - 5,), 0.05)])
    q, k = (torch.randn(size, generator=generator) * shrink @ turn for size in ((1, tokens, 4, dim), (1, keys, dim)))
    w = torch.randn(1, tokens, 3, 4, generator=generator)
    w[:, :, 1] *= torch.tensor([0.0, 1.0, 0.0, -1.0])
    w[:, ::7, 2] = -w[:, ::7, 2].abs()
    w[:, ::11, 0, 3] = torch.nan
    stored = quantize_index_keys(k) if form == "int8" else k
    together = index_topk(q, stored, w, 250, sinks=2, local=30, impl="native")
    for part, weights in enumerate(w.unbind(2)):
        alone = index_topk(q, stored, weights, 250, sinks=2, local=30, impl="native")
        assert torch.equal(together[:, :, part], alone)


@pytest.mark.parametrize("attend", ["reference", "native"])
@every_case
def test_heads_attend_to_their_selection(case: Case, attend: str) -> None:
    if attend == "native" and (case.dtype == torch.float64 or native_support.missing()):
        pytest.skip("no kernel for this")
    inputs = make_inputs(case)
    assert case.selections is not None
    options = {"softcap": case.softcap, "impl": attend}
    out, lse = sparse_attention(inputs.q, inputs.k, inputs.v, inputs.indices, sink_logits=inputs.sink_logits, **options)
    assert out.shape == (*inputs.q.shape[:3], case.value_dim)
    shared = case.heads // case.selections
    for part in range(case.selections):
        q, k, v, sinks = part_of(inputs, part, case.selections)
        heads = slice(part * shared, (part + 1) * shared)
        positions = oracles.selected_positions(inputs.indices[:, :, part])
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        naive, exact = (
            oracles.attention(
                *(x.to(dtype) for x in (q, k, v)), positions, softcap=case.softcap,
                sink_logits=None if sinks is None else sinks.to(dtype),
            )
            for dtype in (wide, torch.float64)
        )  # fmt: skip
        for name, found, *wanted in zip(("out", "lse"), (out, lse), naive, exact):
            assert_within_yardstick(found[:, :, heads], *wanted, what=f"{name} of selection {part}")


@pytest.mark.parametrize("attend", ["reference", "native"])
@pytest.mark.parametrize("case", FINITE, ids=lambda case: case.name)
def test_gradients_are_those_of_the_heads_alone(case: Case, attend: str) -> None:
    if attend == "native" and (case.dtype == torch.float64 or native_support.missing()):
        pytest.skip("no kernel for this")
    inputs = make_inputs(case)
    assert case.selections is not None
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    options = {"softcap": case.softcap, "impl": attend}
    out, _ = sparse_attention(*leaves, inputs.indices, sink_logits=inputs.sink_logits, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, upstream)
    for part in range(case.selections):
        *tensors, sinks = part_of(inputs, part, case.selections)
        alone = [x.requires_grad_() for x in tensors]
        shared = case.heads // case.selections
        own = slice(part * shared, (part + 1) * shared)
        result, _ = sparse_attention(*alone, inputs.indices[:, :, part].clone(), sink_logits=sinks, **options)
        expected = torch.autograd.grad(result, alone, upstream[:, :, own].clone())
        for x, grad, wanted in zip(alone, grads, expected):
            heads = slice(part * x.shape[2], (part + 1) * x.shape[2])
            torch.testing.assert_close(grad[:, :, heads], wanted)


@pytest.mark.parametrize("selected", [False, True], ids=["all_visible", "selected"])
@pytest.mark.parametrize("case", FINITE, ids=lambda case: case.name)
def test_the_loss_is_the_mean_over_selections(case: Case, selected: bool) -> None:
    inputs = make_inputs(case)
    assert case.selections is not None
    index = [x.double().requires_grad_() for x in (inputs.q_index, inputs.k_index, inputs.w_index)]
    loss = indexer_loss(
        *index, inputs.q.double(), inputs.k.double(), indices=inputs.indices if selected else None,
        key_start=inputs.key_start, key_end=inputs.key_end, sinks=case.sinks, local=case.local, softcap=case.softcap,
        sink_logits=None if inputs.sink_logits is None else inputs.sink_logits.double(), impl="reference",
    )  # fmt: skip
    visible = oracles.visible_positions(inputs.key_start, inputs.key_end, case.batch, case.tokens, case.keys)
    kept = oracles.without_always_read(visible, case.sinks, case.local)
    losses = []
    for part in range(case.selections):
        q, k, _, sinks = part_of(inputs, part, case.selections)
        assert q is not None
        assert k is not None
        read = visible
        if selected:
            chosen = oracles.selected_positions(inputs.indices[:, :, part])
            read = [[[s for s in row if s in set(seen)] for row, seen in zip(*rows)] for rows in zip(chosen, visible)]
        losses.append(
            oracles.indexer_loss(
                index[0], index[1], index[2][:, :, part], q.double(), k.double(), read, kept, softcap=case.softcap,
                sink_logits=sinks,
            )
        )  # fmt: skip
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-12)
    for grad, wanted in zip(*(torch.autograd.grad(x, index, allow_unused=True) for x in (loss, expected))):
        torch.testing.assert_close(grad, torch.zeros_like(grad) if wanted is None else wanted, rtol=1e-6, atol=1e-10)


@pytest.mark.skipif(native_support.missing() is not None, reason="the kernels were not built")
@pytest.mark.parametrize("case", [c for c in FINITE if c.dtype == torch.float32], ids=lambda case: case.name)
def test_the_kernels_loss_is_that_of_the_reference(case: Case) -> None:
    inputs = make_inputs(case)

    def loss(impl: str) -> list[Tensor]:
        index = [x.clone().requires_grad_() for x in (inputs.q_index, inputs.k_index, inputs.w_index)]
        value = indexer_loss(
            *index, inputs.q, inputs.k, indices=inputs.indices, key_start=inputs.key_start, key_end=inputs.key_end,
            query_mask=inputs.query_mask, sinks=case.sinks, local=case.local, softcap=case.softcap,
            sink_logits=inputs.sink_logits, impl=impl,
        )  # fmt: skip
        return [value.detach(), *torch.autograd.grad(value, index)]

    for found, wanted in zip(loss("native"), loss("reference")):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_fp8_rows_have_one_kv_head_and_take_one_selection() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = pack_latents(torch.randn(1, 20, 24, generator=generator), 16)
    q, indices = torch.randn(1, 3, 4, 24, generator=generator), torch.randint(0, 20, (1, 3, 5), generator=generator)
    one, several = (sparse_attention(q, rows, None, x)[0] for x in (indices, indices.unsqueeze(2)))
    assert torch.equal(one, several)
    with pytest.raises(ValueError, match="selections of indices must divide the 1 KV heads, got 2"):
        sparse_attention(q, rows, None, indices.unsqueeze(2).repeat(1, 1, 2, 1))


def test_selections_that_do_not_fit_are_refused() -> None:
    inputs = make_inputs(SELECTION_CASES[0])
    two = inputs.indices[:, :, :2]
    with pytest.raises(ValueError, match="indices must divide the 3 KV heads, got 2 in int32"):
        sparse_attention(inputs.q, inputs.k, inputs.v, two)
    with pytest.raises(ValueError, match=r"w must be \[B, T, Gs, Hi\] = \[2, 37, any, 4\]"):
        index_topk(inputs.q_index, inputs.k_index, inputs.w_index[..., :3], 5)
    with pytest.raises(ValueError, match="w must be for at least one selection"):
        index_topk(inputs.q_index, inputs.k_index, inputs.w_index[:, :, :0], 5)
    index = inputs.q_index, inputs.k_index, inputs.w_index
    with pytest.raises(ValueError, match="w_index must divide the 3 KV heads, got 2"):
        indexer_loss(*index[:2], index[2][:, :, :2], inputs.q, inputs.k)
    with pytest.raises(ValueError, match="indices and w_index must be for the same selections"):
        indexer_loss(*index, inputs.q, inputs.k, indices=inputs.indices[:, :, 0])
