"""Selections beside the indexer's: against plain loops, and what all of them must hold to."""

import math
from collections.abc import Callable

import pytest
import torch

import dsa
from dsa.config import LayerConfig
from dsa.eval import selections
from dsa.eval.selections import SELECTIONS, SINKS, blocks, oracle, pattern, selection, window
from dsa.models.context import AttentionCall, DSAContext
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens

HEADS, GROUPS, DIM, SIZE = 4, 2, 6, 4

Ranges = tuple[list[list[int]], list[list[int]]]


def causal(tokens: int, keys: int) -> Ranges:
    return [[0] * tokens], [list(range(keys - tokens + 1, keys + 1))]


def packed(*lengths: int) -> Ranges:
    starts, ends = [], []
    for length in lengths:
        begin = len(ends)
        starts += [begin] * length
        ends += range(begin + 1, begin + length + 1)
    return [starts], [ends]


def padded() -> Ranges:
    """Two texts of 19 tokens, 5 and none of them padding on the left; padding sees nothing."""
    first = [0] * 5 + [5] * 14, [0] * 5 + list(range(6, 20))
    second = [0] * 19, list(range(1, 20))
    return [first[0], second[0]], [first[1], second[1]]


CASES: dict[str, tuple[Ranges, int]] = {
    "one text": (causal(37, 37), 37),
    "behind a cache": (causal(5, 30), 30),
    "one query": (causal(1, 33), 33),
    "packed": (packed(13, 9, 1, 18), 41),
    "padded": (padded(), 19),
    "shorter than a block": (causal(3, 3), 3),
}


def make_call(case: str, softcap: float | None = None, seed: int = 0) -> AttentionCall:
    (starts, ends), keys = CASES[case]
    start, end = torch.tensor(starts, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(*start.shape, HEADS, DIM, generator=generator) * 2
    key = torch.randn(start.shape[0], keys, GROUPS, DIM, generator=generator)
    nothing = torch.empty(0)
    return AttentionCall(0, query, key, key, nothing, None, None, None, None, None, start, end, 0.4, softcap)


def rows(call: AttentionCall, indices: torch.Tensor) -> list[tuple[int, int, int, int, list[int]]]:
    """Batch, query, first visible key, one past the last, and what was selected."""
    assert indices.dtype == torch.int32
    found = []
    for batch, of_text in enumerate(indices.tolist()):
        for query, chosen in enumerate(of_text):
            first, stop = int(call.key_start[batch, query]), int(call.key_end[batch, query])
            found.append((batch, query, first, stop, [each for each in chosen if each >= 0]))
    return found


def scores_of(call: AttentionCall, batch: int, query: int, key: int) -> list[float]:
    shared = HEADS // GROUPS
    return [
        float(call.query[batch, query, head].double() @ call.key[batch, key, head // shared].double()) * call.scale
        for head in range(HEADS)
    ]


def blocks_in_plain_words(call: AttentionCall, batch: int, query: int, top_k: int) -> list[int]:
    first, stop = int(call.key_start[batch, query]), int(call.key_end[batch, query])
    if stop <= first:
        return []
    shared, sums = HEADS // GROUPS, {}
    whole = [b for b in range(stop // SIZE) if b * SIZE >= first]
    for head in range(HEADS):
        q = call.query[batch, query, head].double()
        bounds = {}
        for block in whole:
            keys = call.key[batch, block * SIZE : (block + 1) * SIZE, head // shared].double()
            low, high = keys.min(dim=0).values, keys.max(dim=0).values
            bound = float(torch.maximum(q * low, q * high).sum()) * call.scale
            bounds[block] = call.softcap * math.tanh(bound / call.softcap) if call.softcap else bound
        total = sum(map(math.exp, bounds.values()))
        for block, bound in bounds.items():
            sums[block] = sums.get(block, 0.0) + math.exp(bound) / total
    last = (stop - 1) // SIZE
    heads = range(first // SIZE, (first + SINKS - 1) // SIZE + 1)
    order = [last, *(block for block in heads if block < last)]
    order += sorted((block for block in sums if block not in order), key=lambda block: -sums[block])
    chosen: list[int] = []
    for block in order:
        tokens = range(max(first, block * SIZE), min(stop, (block + 1) * SIZE))
        room = top_k - len(chosen)
        chosen += tokens[max(0, len(tokens) - room) :]
    return sorted(chosen)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("top_k", [8, 11, 17, 64])
@pytest.mark.parametrize("case", CASES)
def test_blocks(case: str, top_k: int, softcap: float | None) -> None:
    call = make_call(case, softcap)
    for batch, query, _, _, chosen in rows(call, blocks(call, top_k, block=SIZE)):
        assert chosen == blocks_in_plain_words(call, batch, query, top_k)


@pytest.mark.parametrize("top_k", [1, 3, 9, 64])
@pytest.mark.parametrize("case", CASES)
def test_window(case: str, top_k: int) -> None:
    call = make_call(case)
    sinks = min(SINKS, top_k - 1)
    for _, _, first, stop, chosen in rows(call, window(call, top_k)):
        visible = range(first, max(first, stop))
        expected = visible if len(visible) <= top_k else [*visible[:sinks], *visible[len(visible) - top_k + sinks :]]
        assert chosen == list(expected)


def pattern_in_plain_words(first: int, stop: int, top_k: int) -> list[int]:
    visible = range(first, max(first, stop))
    if len(visible) <= top_k:
        return list(visible)
    sinks, stride = min(SINKS, top_k - 1), 1
    most = (top_k - sinks) // 2
    while most and -(-len(visible) // stride) > most:
        stride *= 2
    chosen = {*visible[:sinks], *(visible[::stride] if most else ())}
    for token in reversed(visible):
        if len(chosen) == top_k:
            break
        chosen.add(token)
    return sorted(chosen)


@pytest.mark.parametrize("top_k", [1, 3, 6, 9, 17, 64])
@pytest.mark.parametrize("case", CASES)
def test_pattern(case: str, top_k: int) -> None:
    call = make_call(case)
    for _, _, first, stop, chosen in rows(call, pattern(call, top_k)):
        assert chosen == pattern_in_plain_words(first, stop, top_k)


@pytest.mark.parametrize("top_k", [1, 9, 64])
@pytest.mark.parametrize("case", CASES)
def test_oracle(case: str, top_k: int) -> None:
    call = make_call(case)
    for batch, query, first, stop, chosen in rows(call, oracle(call, top_k)):
        if stop <= first:
            assert chosen == []
            continue
        scores = torch.tensor([scores_of(call, batch, query, key) for key in range(first, stop)])
        mass = scores.softmax(dim=0).sum(dim=1)
        best = mass.topk(min(top_k, stop - first)).indices + first
        assert chosen == sorted(best.tolist())


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_what_every_selection_holds_to(case: str, name: str) -> None:
    call, config = make_call(case), dsa.DSAConfig(top_k=9, local=2, sinks=1)
    indices = selection(name, config)(call)
    assert indices.shape[2] == min(9, call.key.shape[1])
    for _, _, first, stop, chosen in rows(call, indices):
        assert len(chosen) == min(9, max(0, stop - first))
        assert chosen == sorted(set(chosen))
        assert all(first <= each < stop for each in chosen)
        if name != "oracle" and chosen:
            assert stop - 1 in chosen
    padding = (indices < 0).int()
    assert bool((padding.diff(dim=2) >= 0).all()), "-1 only at the end"
    assert torch.equal(indices, selection(name, config)(call))


@pytest.mark.parametrize("name", ["blocks", "oracle", "pattern", "window"])
def test_nobody_looks_beyond_what_it_sees(name: str) -> None:
    call, other = make_call("packed"), make_call("packed", seed=1)
    config = dsa.DSAConfig(top_k=9, local=2, sinks=1)
    # queries of the second text, less its last ones: keys before and behind it change
    changed = torch.cat((other.key[:, :13], call.key[:, 13:19], other.key[:, 19:]), dim=1)
    before = selection(name, config)(call)
    call.key = changed
    assert torch.equal(before[:, 13:19], selection(name, config)(call)[:, 13:19])


@pytest.mark.parametrize("name", ["blocks", "oracle", "pattern"])
def test_chunks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call("padded")
    function: Callable[..., torch.Tensor] = getattr(selections, name)
    whole = function(call, 6)
    monkeypatch.setattr(selections, "VALUES_AT_ONCE", 1)
    monkeypatch.setattr(selections, "PROBABILITIES_AT_ONCE", 500)
    assert torch.equal(whole, function(call, 6))


def test_random_goes_on_from_call_to_call() -> None:
    call, config = make_call("one text"), dsa.DSAConfig(top_k=9, local=2, sinks=1)
    chosen = selection("random", config, seed=3)
    first, second = chosen(call), chosen(call)
    assert not torch.equal(first, second)
    assert torch.equal(first, selection("random", config, seed=3)(call))
    assert not torch.equal(first, selection("random", config, seed=4)(call))
    assert bool((first[0, 12:, :SINKS] == torch.arange(SINKS)).all())


def test_an_unknown_selection() -> None:
    with pytest.raises(
        ValueError, match="selection must be one of window, pattern, blocks, oracle, random, got 'quest'"
    ):
        selection("quest", dsa.DSAConfig())


@pytest.mark.parametrize("name", SELECTIONS)
def test_dense_layers_stay_dense_and_every_other_layer_chooses(name: str) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    layers = {0: LayerConfig(dense=True), 1: LayerConfig(top_k=5), 2: LayerConfig(share=1)}
    config = TINY_CONFIG.replace(layers=layers)
    dsa.attach(model, config)
    chosen, asked = selection(name, config), {}

    def select(call: AttentionCall) -> torch.Tensor:
        indices = chosen(call)
        asked[call.layer] = int((indices >= 0).sum(dim=2).max())
        return indices

    with torch.no_grad():
        model(tiny_tokens(1, 40), dsa_context=DSAContext(select=select))
    assert asked == {1: 5, 2: 5}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_budget_for_everything_is_dense(name: str) -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 40)
    with torch.no_grad():
        dense = model(ids).logits
        dsa.attach(model, TINY_CONFIG.replace(top_k=40))
        sparse = model(ids, dsa_context=DSAContext(select=selection(name, TINY_CONFIG.replace(top_k=40)))).logits
    torch.testing.assert_close(sparse, dense, atol=1e-4, rtol=1e-4)
