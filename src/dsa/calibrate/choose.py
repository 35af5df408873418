"""Which layers select for themselves and how much, which read another's selection, and which stay dense.

Every layer must be served: by its own indexer, by an earlier layer's selection, or by full attention. That is a
facility-location problem: selecting layers are the facilities, scanning is what opening one costs, reading and the
harm done are what serving a layer from it costs. It is solved by local search, which for these sizes (tens of layers,
about a dozen budgets) takes milliseconds, and depends on nothing but its input.

Shapes: `L` layers with an indexer, `N` budgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

NEAREST_SOURCES = 4
"""How many sources are tried, the best ones first, when a layer gives up its own selection."""

MAX_SWEEPS = 30
HARM_IS_ALL = 1e12
"""A price at which no cost is spared."""

IMPROVEMENT = 1e-9


@dataclass(frozen=True)
class Choice:
    """One answer; layers are numbered from 0 to `L - 1` here.

    Args:
        level: Number of the budget by layer, of the layers that select for themselves.
        source: The layer whose selection is read, of those that share.
        dense: Layers with full attention.
    """

    level: dict[int, int]
    source: dict[int, int]
    dense: frozenset[int]

    def served_by(self, layer: int) -> tuple[int, int] | None:
        """Who selects for a layer, and at which budget; `None` for dense layers."""
        if layer in self.dense:
            return None
        source = self.source.get(layer, layer)
        return source, self.level[source]


@dataclass(frozen=True)
class Problem:
    """What is chosen from.

    Args:
        read: What reading a budget costs a layer, fp64 `[N]`.
        scan: What selecting costs it in addition, `[N]`.
        dense: What full attention costs it.
        harm: `[L, L, N]`: what goes wrong when the first layer reads what the second selects; infinite where it
            must not. Only the diagonal and what is left of it are looked at.
        max_dense: How many layers may be dense.
        min_shared: How many layers must read another's selection.
        may_share: Whether any may.
    """

    read: torch.Tensor
    scan: torch.Tensor
    dense: float
    harm: torch.Tensor
    max_dense: int
    min_shared: int = 0
    may_share: bool = True

    def cost(self, choice: Choice) -> float:
        """What a choice costs, all layers together."""
        own = sum(float(self.read[level] + self.scan[level]) for level in choice.level.values())
        shared = sum(float(self.read[choice.level[source]]) for source in choice.source.values())
        return own + shared + self.dense * len(choice.dense)

    def harm_of(self, choice: Choice) -> float:
        """The sum of what goes wrong."""
        served = [(layer, choice.served_by(layer)) for layer in range(len(self.harm))]
        return sum(float(self.harm[layer, by[0], by[1]]) for layer, by in served if by is not None)


def choose(problem: Problem, price: float) -> Choice | None:
    """The choice with the least `cost + price * harm` that local search finds.

    Returns:
        `None` where no choice avoids infinite harm, or not enough layers can share.
    """
    search = _Search(problem, price)
    search.descend()
    if not search.share_enough():
        return None
    search.descend()
    return search.choice() if search.total() < torch.inf else None


def ladder(problem: Problem, steps: int = 80) -> list[Choice]:
    """Choices from the cheapest to the one with the least harm, none of them worse than another in both."""
    prices = [*_prices(problem, steps), HARM_IS_ALL]
    found = [choice for choice in (choose(problem, price) for price in prices) if choice is not None]
    rungs: list[Choice] = []
    least = torch.inf
    for choice in sorted(found, key=lambda each: (problem.cost(each), problem.harm_of(each))):
        harm = problem.harm_of(choice)
        if harm < least:
            rungs.append(choice)
            least = harm
    return rungs


def _prices(problem: Problem, steps: int) -> list[float]:
    """From where cost is everything to where harm is, in equal ratios."""
    own = problem.harm.diagonal().T
    gained = own[:, :-1] - own[:, 1:]
    paid = (problem.read + problem.scan).diff().expand_as(gained)
    useful = (gained > 0) & gained.isfinite() & (paid > 0)
    if not bool(useful.any()):
        return [1.0]
    rates = (paid / gained)[useful]
    low, high = float(rates.min()) / 10, float(rates.max()) * 10
    ratio = (high / low) ** (1 / (steps - 1))
    return [low * ratio**step for step in range(steps)]


@dataclass
class _Search:
    problem: Problem
    price: float
    level: dict[int, int] = field(init=False, default_factory=dict)
    dense: set[int] = field(init=False, default_factory=set)
    value: torch.Tensor = field(init=False)
    """`[L, L, N]`: cost and harm of the first layer served by the second."""

    def __post_init__(self) -> None:
        problem = self.problem
        count = len(problem.harm)
        value = problem.read + self.price * problem.harm
        diagonal = torch.arange(count)
        value[diagonal, diagonal] += problem.scan
        earlier = diagonal[:, None] > diagonal if problem.may_share else torch.zeros(count, count, dtype=torch.bool)
        allowed = earlier | torch.eye(count, dtype=torch.bool)
        self.value = value.masked_fill(~allowed[..., None], torch.inf)
        best, levels = value[diagonal, diagonal].min(dim=1)
        gains = best - problem.dense
        order = sorted(range(count), key=lambda layer: (-float(gains[layer]), layer))
        self.dense = {layer for layer in order[: problem.max_dense] if gains[layer] > 0}
        self.level = {layer: int(levels[layer]) for layer in range(count) if layer not in self.dense}

    @property
    def shared(self) -> int:
        return len(self.problem.harm) - len(self.level) - len(self.dense)

    def total(self) -> float:
        return self._total(self.level, self.dense)

    def choice(self) -> Choice:
        source = {}
        for layer in range(len(self.value)):
            if layer not in self.level and layer not in self.dense:
                source[layer] = min(self.level, key=lambda by: (float(self.value[layer, by, self.level[by]]), -by))
        return Choice(dict(sorted(self.level.items())), source, frozenset(self.dense))

    def descend(self) -> None:
        """Changes one or two layers at a time for as long as that helps."""
        best = self.total()
        for _ in range(MAX_SWEEPS):
            before = best
            for layer in range(len(self.value)):
                for total, level, dense in self._moves(layer):
                    if total < best - IMPROVEMENT * max(1.0, abs(best) if best < torch.inf else 1.0):
                        best, self.level, self.dense = total, level, dense
                        break
            if best == before:
                return

    def share_enough(self) -> bool:
        """Lets the layers share whose sharing costs least, until enough do."""
        while self.shared < self.problem.min_shared:
            moves = [move for layer in self.level for move in self._give_up(layer, len(self.level))]
            served = [self.dense - {layer} for layer in self.dense]
            moves += [(self._total(self.level, dense), self.level, dense) for dense in served]
            total, level, dense = min(moves, key=lambda move: move[0], default=(torch.inf, {}, set()))
            if total == torch.inf:
                return False
            self.level, self.dense = level, dense
        return True

    def _moves(self, layer: int) -> Iterator[tuple[float, dict[int, int], set[int]]]:
        """What can be done about one layer, the best of each kind first."""
        spare = self.shared > self.problem.min_shared
        if layer in self.level or layer in self.dense or spare:
            yield self._open(layer, self.level, self.dense - {layer})
        if layer in self.level:
            yield from self._give_up(layer, NEAREST_SOURCES)
        elif layer in self.dense:
            yield self._total(self.level, self.dense - {layer}), self.level, self.dense - {layer}
        if layer in self.dense:
            return
        if layer not in self.level and not spare:
            yield from self._take_over(layer)
            return
        others = {by: level for by, level in self.level.items() if by != layer}
        if len(self.dense) < self.problem.max_dense:
            yield self._total(others, self.dense | {layer}), others, self.dense | {layer}
        else:
            for given_back in sorted(self.dense):
                yield self._open(given_back, others, self.dense - {given_back} | {layer})

    def _take_over(self, layer: int) -> Iterator[tuple[float, dict[int, int], set[int]]]:
        """A layer that shares does what another did, which shares from now on."""
        for by in self.level:
            yield self._open(layer, {each: level for each, level in self.level.items() if each != by}, self.dense)
        for left in sorted(self.dense):
            dense = self.dense - {left} | {layer}
            yield self._total(self.level, dense), self.level, dense

    def _open(self, layer: int, level: dict[int, int], dense: set[int]) -> tuple[float, dict[int, int], set[int]]:
        """The layer selects for itself, at the best budget."""
        others = {by: each for by, each in level.items() if by != layer}
        totals = self._totals(others, dense, layer)
        best = int(totals.argmin())
        return float(totals[best]), {**others, layer: best}, dense

    def _give_up(self, layer: int, sources: int) -> list[tuple[float, dict[int, int], set[int]]]:
        """The layer shares instead; one source may change its budget for that."""
        if not self.problem.may_share:
            return []
        others = {by: each for by, each in self.level.items() if by != layer}
        before = [by for by in others if by < layer]
        before.sort(key=lambda by: (float(self.value[layer, by, others[by]]), -by))
        moves = [self._open(by, others, self.dense) for by in before[:sources]]
        return sorted(moves, key=lambda move: move[0])

    def _total(self, level: dict[int, int], dense: set[int]) -> float:
        if not level:
            return self.problem.dense * len(dense) if len(dense) == len(self.value) else torch.inf
        first = min(level)
        others = {by: each for by, each in level.items() if by != first}
        return float(self._totals(others, dense, first)[level[first]])

    def _totals(self, level: dict[int, int], dense: set[int], opened: int) -> torch.Tensor:
        """Totals `[N]` if, in addition to those in `level`, the layer `opened` selects, at each of the budgets."""
        sources, levels = torch.tensor(list(level), dtype=torch.long), torch.tensor(list(level.values()))
        own = self.value[sources, sources, levels.long()]
        served = torch.ones(len(self.value), dtype=torch.bool)
        served[[opened, *level, *dense]] = False
        candidates = self.value[served, opened]
        if level:
            others = self.value[served][:, sources, levels.long()].amin(dim=1, keepdim=True)
            candidates = torch.minimum(candidates, others)
        fixed = own.sum() + self.problem.dense * len(dense)
        return fixed + self.value[opened, opened] + candidates.sum(dim=0)
