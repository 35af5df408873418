"""Visible ranges: defaults, and blocks that cover exactly what their queries see."""

import pytest
import torch

from dsa.ops import blocks
from dsa.ops.ranges import resolve_ranges
from dsa.testing import oracles
from dsa.testing.cases import CASES, Case

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("budget", [1, 100, 1 << 20])
def test_blocks_cover_what_their_queries_see(case: Case, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.BUDGET_BYTES, "cpu", budget)
    start, end = case.ranges(case.batch, case.tokens, case.keys) or (None, None)
    ranges = resolve_ranges("op", start, end, case.batch, case.tokens, case.keys, CPU)
    seen = oracles.visible_positions(start, end, case.batch, case.tokens, case.keys)
    for ranges_of, positions in (
        (ranges, seen),
        (ranges.shrink(2, 1), oracles.without_always_read(seen, 2, 1)),
    ):
        covered = []
        for block in ranges_of.blocks(1):
            rows = block.rows.stop - block.rows.start
            assert rows == 1 or rows * block.width <= budget
            columns = list(range(block.columns.start, block.columns.stop))
            hidden = torch.zeros(case.batch, rows, block.width, dtype=torch.bool)
            for part, mask in ranges_of.hidden_within(block):
                hidden[..., part] = mask
            for b in range(case.batch):
                for i, t in enumerate(range(block.rows.start, block.rows.stop)):
                    assert [s for s, gone in zip(columns, hidden[b, i].tolist()) if not gone] == positions[b][t]
            covered += range(block.rows.start, block.rows.stop)
        assert covered == list(range(case.tokens if case.batch else 0))
    some = {(b, s) for b in range(case.batch) for row in seen[b] for s in row}
    assert {tuple(place) for place in ranges.seen_keys(case.keys).nonzero().tolist()} == some
    assert [list(range(block.columns.start, block.columns.stop)) for block in ranges.single_queries()] == [
        row for rows in seen for row in rows
    ]


def test_edges_of_a_causal_block_are_its_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = resolve_ranges("op", None, None, 1, 100, 1000, CPU)
    monkeypatch.setitem(blocks.BUDGET_BYTES, "cpu", 4 * 40_000)
    parts = list(ranges.blocks(4))
    assert [(block.rows, block.columns.stop) for block in parts] == [
        (slice(0, 42), 942),
        (slice(42, 82), 982),
        (slice(82, 100), 1000),
    ]
    assert [ranges.edges_within(block) for block in parts] == [[(901, 942)], [(943, 982)], [(983, 1000)]]


def test_blocks_of_a_window_are_as_long_as_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    end = torch.arange(1, 10_001)[None]
    ranges = resolve_ranges("op", (end - 64).clamp_min(0), end, 1, 10_000, 10_000, CPU)
    monkeypatch.setitem(blocks.BUDGET_BYTES, "cpu", 1_000_000)
    assert len(list(ranges.blocks(1))) < 20


def test_defaults_are_causal_and_right_aligned() -> None:
    ranges = resolve_ranges("op", None, None, 2, 3, 5, CPU)
    assert ranges.start.tolist() == [[0, 0, 0]] * 2
    assert ranges.end.tolist() == [[3, 4, 5]] * 2
    assert resolve_ranges("op", None, None, 1, 4, 2, CPU).end.tolist() == [[0, 0, 1, 2]]
    only_start = resolve_ranges("op", torch.ones(1, 3, dtype=torch.int64), None, 1, 3, 5, CPU)
    assert (only_start.start.tolist(), only_start.end.tolist()) == ([[1, 1, 1]], [[3, 4, 5]])
    only_end = resolve_ranges("op", None, torch.ones(1, 3, dtype=torch.int32), 1, 3, 5, CPU)
    assert (only_end.start.tolist(), only_end.end.tolist()) == ([[0, 0, 0]], [[1, 1, 1]])
