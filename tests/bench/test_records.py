"""The records that are kept: each is in the index, texts name those that are there, and none holds every sample."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from dsa.bench.result import FORMAT, read_rows
from dsa.bench.suites import E2E, OPS
from dsa.bench.targets import read_targets

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "results"
OWN = [path for path in sorted(RECORDS.glob("*.json")) if json.loads(path.read_text()).get("format") == FORMAT]


def test_every_record_is_in_the_index_and_the_other_way_round() -> None:
    index = re.findall(r"^\| `([^`]+)` \|", (RECORDS / "README.md").read_text(), re.MULTILINE)
    assert index == sorted(path.name for path in RECORDS.iterdir() if path.name != "README.md")


def test_the_index_has_a_description_a_command_and_a_commit_each() -> None:
    lines = [line for line in (RECORDS / "README.md").read_text().splitlines() if line.startswith("| `")]
    for line in lines:
        _, shows, command, where = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert shows
        assert command.startswith("`")
        assert re.fullmatch(r"\d+, (AVX2, |AVX-512 VNNI, )?[0-9a-f]{7}(, [0-9a-f]{7})*", where), where


def test_texts_name_records_that_are_there() -> None:
    texts = [path for folder in ("docs", "src", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*")]
    texts += ROOT.glob("*.md")
    named = {
        name
        for path in texts
        if path.suffix in (".md", ".py")
        for name in re.findall(r"benchmarks/results/([\w-]+\.json)", path.read_text())
    }
    assert named
    # What a command is to write, with a date in its name.
    assert {name for name in named if "DATE" not in name} <= {path.name for path in RECORDS.iterdir()}


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_records_hold_quantiles_in_their_order(path: Path) -> None:
    for row in json.loads(path.read_text())["rows"]:
        for timing in row["timings"].values():
            assert "seconds" not in timing
            ordered = [timing[f"{name}_s"] for name in ("low", "lower_quartile", "median", "upper_quartile", "high")]
            # Samples of older records were rounded to six digits before quartiles were taken of them.
            assert all(low <= high * (1 + 1e-5) for low, high in pairwise(ordered))
    assert read_rows(path) == json.loads(path.read_text())["rows"]


def test_each_target_of_the_project_speaks_of_a_figure_of_the_newest_records() -> None:
    targets = read_targets(ROOT / "benchmarks" / "targets.json", (*OPS, *E2E))
    newest = [sorted(RECORDS.glob(f"*-{kind}.json"))[-1] for kind in ("ops", "e2e")]
    rows = [row for path in newest for row in read_rows(path)]
    for target in targets:
        figures = [figure["name"] for row in rows if target.covers(row) for figure in row["figures"]]
        assert target.figure in figures, target
