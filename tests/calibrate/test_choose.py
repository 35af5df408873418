"""The search for an arrangement, against trying all of them."""

import itertools

import pytest
import torch

from dsa.calibrate.calibration import first_true
from dsa.calibrate.choose import Choice, Problem, choose, ladder


def problem(layers: int, budgets: int, seed: int, **limits) -> Problem:
    """Random but ordered as real ones are: larger budgets do less harm, nearer sources too."""
    generator = torch.Generator().manual_seed(seed)
    top_k = torch.tensor([320.0 * 2 ** (number / 2) for number in range(budgets)], dtype=torch.float64)
    lost = torch.rand(layers, generator=generator, dtype=torch.float64)
    harm = torch.full((layers, layers, budgets), torch.inf, dtype=torch.float64)
    for layer, source in itertools.product(range(layers), repeat=2):
        if source <= layer:
            distance = (layer - source) * float(torch.rand((), generator=generator))
            harm[layer, source] = lost[layer] * (1 + distance) * (320 / top_k) ** 1.5
    return Problem(top_k / 6144, torch.full((budgets,), 0.11, dtype=torch.float64), 1.0, harm, **limits)


def every(problem: Problem):
    layers, _, budgets = problem.harm.shape
    share, dense = budgets, budgets + 1
    for kinds in itertools.product(range(budgets + 2), repeat=layers):
        level = {layer: kind for layer, kind in enumerate(kinds) if kind < budgets}
        sharing = [layer for layer, kind in enumerate(kinds) if kind == share]
        sources = [[by for by in level if by < layer] for layer in sharing]
        left = frozenset(layer for layer, kind in enumerate(kinds) if kind == dense)
        if len(left) > problem.max_dense or len(sharing) < problem.min_shared:
            continue
        if sharing and not problem.may_share:
            continue
        for chosen in itertools.product(*sources):
            yield Choice(level, dict(zip(sharing, chosen)), left)


@pytest.mark.parametrize("limits", [(0, 0, True), (1, 0, True), (1, 1, True), (0, 2, True), (1, 0, False)])
@pytest.mark.parametrize("seed", range(3))
def test_close_to_the_best(limits: tuple[int, int, bool], seed: int) -> None:
    given = problem(4, 3, seed, max_dense=limits[0], min_shared=limits[1], may_share=limits[2])
    choices = list(every(given))
    for price in (0.3, 3.0, 30.0):
        found = choose(given, price)
        assert found is not None
        assert found in choices
        value = given.cost(found) + price * given.harm_of(found)
        best = min(given.cost(each) + price * given.harm_of(each) for each in choices)
        assert value <= best * 1.05


def test_what_cannot_be() -> None:
    given = problem(3, 2, 0, max_dense=0, min_shared=2)
    given.harm[1, 0] = given.harm[2, :2] = torch.inf
    assert choose(given, 1.0) is None
    assert ladder(given) == []


def test_a_ladder_goes_from_cheap_to_faithful() -> None:
    given = problem(12, 6, 1, max_dense=1)
    rungs = ladder(given)
    costs, harms = [given.cost(rung) for rung in rungs], [given.harm_of(rung) for rung in rungs]
    assert costs == sorted(costs)
    assert harms == sorted(harms, reverse=True)
    assert len(rungs) > 10
    assert ladder(given) == rungs
    assert set(rungs[-1].level.values()) == {5}
    assert (len(rungs[-1].source), len(rungs[-1].dense)) == (0, 1)
    assert rungs[0].source


def test_nothing_to_gain() -> None:
    given = problem(3, 2, 0, max_dense=0)
    given.harm.nan_to_num_(posinf=torch.inf).mul_(0.0).nan_to_num_(nan=torch.inf)
    assert len(ladder(given)) == 1


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_first_true(count: int) -> None:
    for first in range(count + 1):
        for guess in range(count):
            asked: list[int] = []

            def reaches(number: int, first: int = first, asked: list[int] = asked) -> bool:
                asked.append(number)
                return number >= first

            assert first_true(reaches, count, guess) == (first if first < count else None)
            assert len(asked) == len(set(asked)) <= 2 * count.bit_length() + 1
