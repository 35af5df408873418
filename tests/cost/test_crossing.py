"""The crossing point against trying every length."""

import itertools
import random

import pytest

from dsa import DSAConfig, LayerConfig
from dsa.cost import crossing_point, decode_work, prefill_work, read_model, total
from dsa.cost.work import budgets


def by_trying(saving: list[float]) -> int | None:
    """`saving[n - 1]` for each length."""
    losses = [n for n, saved in enumerate(saving, 1) if saved <= 0]
    if not losses:
        return 1
    return None if losses[-1] == len(saving) else losses[-1] + 1


@pytest.mark.parametrize("seed", range(300))
def test_random_pieces(seed: int) -> None:
    rng = random.Random(seed)
    longest = rng.randint(5, 200)
    breakpoints = sorted(rng.sample(range(1, longest), rng.randint(0, 3)))
    edges = [0, *breakpoints, longest]
    saving: list[float] = []
    for low, high in itertools.pairwise(edges):
        a, b, middle = rng.choice([0, 0, 1, -1, 0.1]), rng.randint(-9, 9), rng.randint(low, high)
        c = rng.randint(-200, 200)
        saving += [a * (n - middle) ** 2 + b * (n - middle) + c for n in range(low + 1, high + 1)]
    assert crossing_point(lambda n: saving[n - 1], breakpoints, longest) == by_trying(saving)


@pytest.mark.parametrize("work", ["decode", "prefill"])
def test_a_model_with_several_budgets(work: str) -> None:
    shape, _ = read_model("SmolLM2-135M")
    config = DSAConfig(
        top_k=300, layers={1: LayerConfig(top_k=500), 2: LayerConfig(dense=True), 3: LayerConfig(share=1)}
    )
    assert budgets(shape, [None, config]) == [300, 500]

    def saving(n: int) -> float:
        run = (lambda c: prefill_work(shape, c, n)) if work == "prefill" else (lambda c: decode_work(shape, c, n, n))
        return total(run(None)).multiply_adds - total(run(config)).multiply_adds

    found = crossing_point(saving, budgets(shape, [config]), 3000)
    assert found == by_trying([saving(n) for n in range(1, 3001)])
    assert found is not None
    assert 300 < found < 1000
