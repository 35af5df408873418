"""What times say of each other."""

import math

import pytest

from dsa.bench.measure import Figure, Timing, in_turn, median_interval, ratio


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    timings = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, budget=60, most=3)
    assert calls == ["a", "b"] * 4, "a warm-up and three rounds"
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_what_exceeds_the_budget_runs_once_and_counts() -> None:
    calls: list[str] = []
    timings = in_turn({"a": lambda: calls.append("a")}, budget=0.0, before=lambda: calls.append("before"))
    assert calls == ["before", "a"]
    assert len(timings["a"].seconds) == 1


def test_a_ratio_is_the_median_over_the_rounds() -> None:
    figure = ratio("peer / own", Timing((2.0, 30.0, 8.0)), Timing((1.0, 10.0, 2.0)))
    assert (figure.value, figure.low, figure.high) == (3.0, 2.0, 4.0)
    assert figure.confidence == pytest.approx(0.75)
    assert ratio("once", Timing((3.0,)), Timing((2.0,))).low is None


@pytest.mark.parametrize(("count", "cut"), [(5, 0), (6, 0), (9, 1), (20, 5), (100, 39)])
def test_the_interval_covers_what_it_claims(count: int, cut: int) -> None:
    low, high, confidence = median_interval([float(number) for number in range(count)])
    assert (low, high) == (cut, count - 1 - cut)
    # the probability that neither too few nor too many of the runs lie below the median
    inside = sum(math.comb(count, below) for below in range(cut + 1, count - cut)) / 2**count
    assert confidence == pytest.approx(inside)
    assert confidence >= 0.95 or count < 6


def test_figures_write_what_they_know() -> None:
    assert Figure("speed", 3.0, "x").to_json() == {"name": "speed", "value": 3.0, "unit": "x"}


def test_a_record_keeps_quantiles() -> None:
    assert Timing((4.0, 1.0, 2.0, 5.0, 3.0)).to_json() == {
        "median_s": 3.0,
        "low_s": 1.0,
        "lower_quartile_s": 2.0,
        "upper_quartile_s": 4.0,
        "high_s": 5.0,
        "runs": 5,
    }
    assert set(Timing((2.0,)).to_json().values()) == {2.0, 1}
