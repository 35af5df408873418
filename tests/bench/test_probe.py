"""The machine's limits, and the floors that follow."""

import pytest

from dsa.bench.decode import floors
from dsa.bench.probe import Limits, measure_limits
from dsa.bench.tensors import LARGE_SIZES
from dsa.ops import native_support


def test_limits_are_positive() -> None:
    limits = measure_limits(quick=True)
    if native_support.missing() is not None:
        assert limits is None
        return
    assert limits is not None
    assert min(limits.read, limits.fp32, limits.int8) > 0


def test_a_floor_is_the_longer_of_reading_and_computing() -> None:
    limits = Limits(read=10.0, fp32=100.0, int8=1000.0)
    assert limits.floor(bytes_read=50) == 5
    assert limits.floor(bytes_read=50, fp32=1000) == 10
    assert limits.floor(bytes_read=50, fp32=200, int8=4000) == 6


def test_the_floor_of_a_decode_step() -> None:
    found = floors(131072, LARGE_SIZES, Limits(read=1.0, fp32=1e30, int8=1e30))
    assert found["scan"] == 131072 * (64 + 4)
    assert found["attend"] == pytest.approx(2048 * 8 * 2 * 128 * 4)
