"""`index_topk`: selections against a row-by-row sort, the tie rule, and what must not change a selection."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa.ops import QuantizedKeys, index_topk, quantize_index_keys
from dsa.ops.quantize import hadamard_transform, is_power_of_two, quantize_index_queries
from dsa.testing import oracles
from dsa.testing.cases import CASES, IMPLEMENTATIONS, Case, Inputs, make_inputs

OPERATIONS = ("index_topk",)
BY_NAME = {case.name: case for case in CASES}


def run(case: Case, inputs: Inputs, impl: str, keys: torch.Tensor | QuantizedKeys | None = None) -> torch.Tensor:
    return index_topk(
        inputs.q_index,
        inputs.k_index if keys is None else keys,
        inputs.w_index,
        case.top_k,
        sinks=case.sinks,
        local=case.local,
        key_start=inputs.key_start,
        key_end=inputs.key_end,
        impl=impl,
    )


def visible(case: Case, inputs: Inputs) -> oracles.Positions:
    return oracles.visible_positions(inputs.key_start, inputs.key_end, case.batch, case.tokens, case.keys)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_selects_the_highest_scores(case: Case, impl: str) -> None:
    inputs = make_inputs(case)
    selection = run(case, inputs, impl)
    assert selection.dtype == torch.int32
    scores = oracles.index_scores(inputs.q_index.double(), inputs.k_index.double(), inputs.w_index.double())
    if case.content == "random":
        size = scores.abs().amax().item() if scores.numel() else 0.0
        tolerance = 1e-5 * size if case.dtype != torch.float64 else 1e-13 * size
        seen = visible(case, inputs)
        oracles.assert_selection_optimal(selection, scores, seen, case.top_k, case.sinks, case.local, tolerance)
    else:
        expected = oracles.select(scores, visible(case, inputs), case.top_k, case.sinks, case.local)
        assert torch.equal(selection, expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_int8_selection_is_exactly_that_of_the_documented_scores(case: Case, impl: str) -> None:
    inputs = make_inputs(case)
    keys = quantize_index_keys(inputs.k_index)
    query, query_scale = quantize_index_queries(inputs.q_index)
    scale = case.index_dim**-0.5
    scores = oracles.int8_index_scores(query, query_scale, keys.data, keys.scale, inputs.w_index, scale)
    expected = oracles.select(scores, visible(case, inputs), case.top_k, case.sinks, case.local)
    assert torch.equal(run(case, inputs, impl, keys), expected)


@pytest.mark.parametrize("name", ["odd_lengths", "index_dim_24", "left_padding", "sinks_and_local", "not_finite"])
def test_fp8_selection_is_that_of_the_dequantised_keys(name: str, impl: str) -> None:
    case = BY_NAME[name]
    inputs = make_inputs(case)
    keys = quantize_index_keys(inputs.k_index, "fp8")
    query = hadamard_transform(inputs.q_index) if is_power_of_two(case.index_dim) else inputs.q_index
    scores = oracles.index_scores(query.double(), keys.dequantize().double(), inputs.w_index.double())
    seen = visible(case, inputs)
    selection = run(case, inputs, impl, keys)
    if case.content == "poisoned":
        assert torch.equal(selection, oracles.select(scores, seen, case.top_k, case.sinks, case.local))
    else:
        oracles.assert_selection_optimal(selection, scores, seen, case.top_k, case.sinks, case.local, 1e-5)


@pytest.mark.parametrize("dtype", ["int8", "fp8", None])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("tiny_blocks")
def test_blocks_do_not_change_a_selection(case: Case, dtype: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(case)
    keys = None if dtype is None else quantize_index_keys(inputs.k_index, dtype)
    one_by_one = run(case, inputs, "reference", keys)
    monkeypatch.undo()
    assert torch.equal(run(case, inputs, "reference", keys), one_by_one)


def make_index(tokens: int, keys: int, seed: int, **options: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (1, tokens, 4, 32), (1, keys, 32), (1, tokens, 4)
    return tuple(torch.randn(size, generator=generator).to(**options) for size in sizes)


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "fp8"])
def test_chunks_padding_packing_and_batching_do_not_change_a_selection(form: str, impl: str) -> None:
    tokens, top_k = 151, 19
    q, k, w = make_index(tokens, tokens, 0, dtype=torch.bfloat16 if form == "bf16" else torch.float32)
    k[:, 40:90] = k[:, 50:100].clone()  # Equal scores far apart and side by side.

    def topk(
        q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, start: torch.Tensor | None = None, **ends: torch.Tensor
    ) -> torch.Tensor:
        keys = quantize_index_keys(k, form) if form in ("int8", "fp8") else k
        return index_topk(q, keys, w, top_k, sinks=2, local=3, key_start=start, impl=impl, **ends)

    whole = topk(q, k, w)
    for cut in (1, 64, 100, 150):
        assert torch.equal(topk(q[:, :cut], k[:, :cut], w[:, :cut]), whole[:, :cut]), "the first chunk"
        assert torch.equal(topk(q[:, cut:], k, w[:, cut:]), whole[:, cut:]), "the second chunk"
    assert torch.equal(
        torch.cat([topk(q[:, t : t + 1], k[:, : t + 1], w[:, t : t + 1]) for t in range(60)], 1)[0], whole[0, :60]
    ), "one token at a time"

    def shifted(by: int) -> torch.Tensor:
        return torch.where(whole < 0, whole, whole + by)

    pad = 13
    garbage = torch.full((1, pad, 4, 32), torch.nan), torch.full((1, pad, 32), torch.nan), torch.zeros(1, pad, 4)
    padded = [torch.cat((extra.to(real.dtype), real), dim=1) for extra, real in zip(garbage, (q, k, w))]
    start = torch.full((1, tokens + pad), pad, dtype=torch.int32)
    assert torch.equal(topk(*padded, start)[:, pad:], shifted(pad)), "padding on the left"

    twice = [torch.cat((x, x), dim=1) for x in (q, k, w)]
    start = torch.tensor([0, tokens]).repeat_interleave(tokens)[None].int()
    end = torch.arange(1, 2 * tokens + 1)[None].int()
    assert torch.equal(topk(*twice, start, key_end=end), torch.cat((whole, shifted(tokens)), dim=1)), "packed"

    stacked = topk(*(torch.cat((x, x.flip(1)), dim=0) for x in (q, k, w)))
    assert torch.equal(stacked[:1], whole), "beside another sequence"


@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_threads_do_not_change_a_selection(form: str, impl: str) -> None:
    q, k, w = make_index(130, 700, 1)
    keys = quantize_index_keys(k) if form == "int8" else k
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = index_topk(q, keys, w, 50, impl=impl)
        torch.set_num_threads(2)
        assert torch.equal(index_topk(q, keys, w, 50, impl=impl), alone)
    finally:
        torch.set_num_threads(before)


def test_most_recent_of_equals_wins(impl: str) -> None:
    q, k, w = torch.zeros(1, 6, 1, 2), torch.ones(1, 6, 2), torch.ones(1, 6, 1)
    selection = index_topk(q, k, w, 3, impl=impl)
    assert selection[0].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


def test_zero_equals_minus_zero(impl: str) -> None:
    q, w = torch.ones(1, 1, 1, 1), -torch.ones(1, 1, 1)
    k = torch.tensor([0.0, -1.0, -0.0, 5.0, -2.0]).view(1, 5, 1)
    assert index_topk(q, k, w, 2, impl=impl).tolist() == [[[2, 4]]]


def test_unknown_scores_rank_below_every_number(impl: str) -> None:
    nan = torch.nan
    q, w = torch.eye(2)[None, None], torch.tensor([1.0, -1.0]).view(1, 1, 2)
    # The second head takes away what the key holds in its second dim.
    k = torch.tensor([[1, 0], [3e38, 0], [nan, 0], [0, 3e38], [3e38, 0], [nan, nan], [0, 0]])[None]
    order = [4, 1, 0, 6, 3, 5, 2]
    for top_k in range(1, 8):
        assert index_topk(q, k, w, top_k, impl=impl)[0, 0].tolist() == sorted(order[:top_k])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_infinite_scores_are_numbers(sign: float, impl: str) -> None:
    q, w = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1), sign)
    k = torch.tensor([torch.nan, torch.inf, 1.0, torch.inf, 2.0]).view(1, 5, 1)
    order = [3, 1, 4, 2, 0] if sign > 0 else [2, 4, 3, 1, 0]
    for top_k in range(1, 6):
        assert index_topk(q, k, w, top_k, impl=impl)[0, 0].tolist() == sorted(order[:top_k])
    assert index_topk(q, k, w, 2, sinks=1, local=1, impl=impl)[0, 0].tolist() == [0, 4]


def test_unknown_weight_falls_back_to_the_most_recent(impl: str) -> None:
    q, k, w = make_index(1, 20, 2)
    w[:] = torch.nan
    for keys in (k, quantize_index_keys(k)):
        assert index_topk(q, keys, w, 3, sinks=1, impl=impl)[0, 0].tolist() == [0, 18, 19]


def test_scale_may_be_negative_or_zero(impl: str) -> None:
    q, k, w = make_index(9, 40, 3)
    for keys in (k, quantize_index_keys(k)):
        lowest = index_topk(q, keys, w, 5, scale=-0.3, impl=impl)
        assert torch.equal(lowest, index_topk(q, keys, -w, 5, scale=0.3, impl=impl))
        assert index_topk(q, keys, w, 2, scale=0.0, impl=impl)[0, -1].tolist() == [38, 39]


def test_sums_beyond_fp32_integers_stay_exact(impl: str) -> None:
    generator = torch.Generator().manual_seed(8)
    size = 4 * 4095
    q, k = torch.rand(1, 3, 2, size, generator=generator), torch.rand(1, 40, size, generator=generator)
    keys, (query, query_scale) = quantize_index_keys(k), quantize_index_queries(q)
    w, seen = torch.ones(1, 3, 2), oracles.visible_positions(None, None, 1, 3, 40)
    scores = oracles.int8_index_scores(query, query_scale, keys.data, keys.scale, w, size**-0.5)
    assert (query.long()[0, 0, 0] * keys.data.long()[0, 0]).sum() > 1 << 24
    for top_k in range(1, 40, 6):
        assert torch.equal(index_topk(q, keys, w, top_k, impl=impl), oracles.select(scores, seen, top_k, 0, 0))


def test_sliced_keys_are_the_keys_of_the_slice(impl: str) -> None:
    q, k, w = make_index(5, 90, 4)
    sliced = quantize_index_keys(k)[:, 10:71]
    assert torch.equal(
        index_topk(q, sliced, w, 7, impl=impl), index_topk(q, quantize_index_keys(k[:, 10:71]), w, 7, impl=impl)
    )


def test_no_gradient_and_no_change_of_inputs(impl: str) -> None:
    q, k, w = (x.requires_grad_() for x in make_index(7, 30, 5))
    copies = [x.detach().clone() for x in (q, k, w)]
    assert not index_topk(q, k, w, 3, impl=impl).requires_grad
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, w), copies))


def test_autocast_does_not_narrow_the_scores(impl: str) -> None:
    q, k, w = make_index(40, 300, 6)
    for keys in (k, quantize_index_keys(k)):
        plain = index_topk(q, keys, w, 20, impl=impl)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(index_topk(q, keys, w, 20, impl=impl), plain)


@given(data=st.data())
def test_any_ranges_and_ties(data: st.DataObject) -> None:
    batch, tokens, keys = (data.draw(st.integers(low, high)) for low, high in ((1, 2), (1, 7), (0, 24)))
    sinks, local, extra = (data.draw(st.integers(0, 4)) for _ in range(3))
    top_k = max(1, sinks + local + extra)
    heads, dim = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 4]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))
    q, k, w = (
        torch.randint(-2, 3, size, generator=generator).float()
        for size in ((batch, tokens, heads, dim), (batch, keys, dim), (batch, tokens, heads))
    )
    bounds = [torch.randint(0, keys + 1, (batch, tokens), generator=generator).int() for _ in range(2)]
    start, end = (data.draw(st.sampled_from([None, bound])) for bound in bounds)
    seen = oracles.visible_positions(start, end, batch, tokens, keys)
    # A power of two keeps equal scores equal.
    scores = oracles.index_scores(q.double(), k.double(), w.double(), scale=0.5)
    expected = oracles.select(scores, seen, top_k, sinks, local)
    for impl in IMPLEMENTATIONS["index_topk"]:
        options = {"scale": 0.5, "sinks": sinks, "local": local, "key_start": start, "key_end": end, "impl": impl}
        assert torch.equal(index_topk(q, k, w, top_k, **options), expected)
        query, query_scale = quantize_index_queries(q)
        quantized = quantize_index_keys(k)
        scores = oracles.int8_index_scores(query, query_scale, quantized.data, quantized.scale, w, scale=0.5)
        rounded = oracles.select(scores, seen, top_k, sinks, local)
        assert torch.equal(index_topk(q, quantized, w, top_k, **options), rounded)
