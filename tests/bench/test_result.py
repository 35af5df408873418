"""What is kept of a measurement, and drawn from it."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsa.bench.measure import Timing
from dsa.bench.plot import curves
from dsa.bench.result import FORMAT, Row, merged, read_rows


def row(length: int, *, isa: str = "avx2", seconds: float = 1.0) -> dict[str, Any]:
    made = Row("prefill", f"n = {length}, gaussian", {}, {"DSA": Timing((seconds,)), "  part": Timing((0.5,))})
    made.length = length
    plain = made.to_json()
    return {**plain, "environment": {**plain["environment"], "isa": isa, "threads": 2}}


def test_a_row_takes_the_place_of_its_earlier_self() -> None:
    rows: list[dict[str, Any]] = []
    for new in (row(64), row(128), row(64, isa="avx512"), row(64, seconds=2.0)):
        rows = merged(rows, new)
    found = [(each["length"], each["environment"]["isa"], each["timings"]["DSA"]["median_s"]) for each in rows]
    assert found == [(64, "avx2", 2.0), (128, "avx2", 1.0), (64, "avx512", 1.0)]


def test_curves_need_two_lengths_and_leave_parts_out() -> None:
    assert curves([row(64)]) == {}
    assert curves([row(128, seconds=3.0), row(64)]) == {
        "prefill, gaussian": {"DSA": [(64, 1.0, 1.0, 1.0), (128, 3.0, 3.0, 3.0)]}
    }
    several = curves([row(64), row(128), row(64, isa="avx512"), row(128, isa="avx512")])
    assert list(several) == ["prefill, gaussian (avx2, 2 threads)", "prefill, gaussian (avx512, 2 threads)"]


@pytest.mark.parametrize("key", ["commit", "machine", "isa", "threads", "torch", "python", "implementations", "date"])
def test_figures_carry_where_they_come_from(key: str) -> None:
    assert key in row(64)["environment"]


def test_samples_of_earlier_records_become_quantiles(tmp_path: Path) -> None:
    earlier = {"median_s": 2.0, "low_s": 1.0, "high_s": 3.0, "runs": 3, "seconds": [1.0, 3.0, 2.0]}
    file = tmp_path / "earlier.json"
    file.write_text(json.dumps({"format": FORMAT, "rows": [{**row(64), "timings": {"DSA": earlier}}]}))
    (read,) = read_rows(file)
    assert read["timings"]["DSA"] == Timing((1.0, 3.0, 2.0)).to_json()
    assert {key: read[key] for key in read if key != "timings"} == {
        key: value for key, value in row(64).items() if key != "timings" and key != "environment"
    } | {"environment": read["environment"]}
