"""Targets of figures: how a file is read, which rows it covers, and whether a figure reaches its target."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsa.bench.targets import FORMAT, is_met, read_targets, with_targets, without_figure

ROW: dict[str, Any] = {
    "name": "decode",
    "case": "n = 64",
    "shape": {"top_k": 8},
    "figures": [{"name": "speed", "value": 3.0, "unit": "x"}, {"name": "memory", "value": 3.0, "unit": "MB"}],
}
SPEED = {"row": "decode", "case": "n = 64", "figure": "speed", "at_least": 3}
MEMORY = {"row": "decode", "case": "n = 64", "figure": "memory", "at_most": 2.5}


def written(folder: Path, *entries: Any) -> Path:
    file = folder / "targets.json"
    file.write_text(json.dumps({"format": FORMAT, "targets": list(entries)}))
    return file


def test_figures_say_whether_they_are_met(tmp_path: Path) -> None:
    targets = read_targets(written(tmp_path, SPEED, MEMORY), ["decode"])
    speed, memory = with_targets(ROW, targets)["figures"]
    assert (speed["target"], speed["at_least"], is_met(speed)) == (3, True, True)
    assert (memory["target"], memory["at_least"], is_met(memory)) == (2.5, False, False)
    assert is_met(ROW["figures"][0]) is None
    assert "target" not in ROW["figures"][0]


@pytest.mark.parametrize(
    "other",
    [{"case": "n = 128"}, {"row": "prefill"}, {"figure": "size"}, {"shape": {"top_k": 16}}, {"shape": {"heads": 8}}],
)
def test_other_rows_have_no_target(tmp_path: Path, other: dict[str, Any]) -> None:
    targets = read_targets(written(tmp_path, SPEED | other), ["decode", "prefill"])
    assert with_targets(ROW, targets) == ROW
    assert without_figure(ROW, targets) == (["size"] if "figure" in other else [])


def test_the_shape_may_say_which_rows_count(tmp_path: Path) -> None:
    targets = read_targets(written(tmp_path, SPEED | {"shape": {"top_k": 8}}), ["decode"])
    assert with_targets(ROW, targets)["figures"][0]["target"] == 3


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ([], r"entry 2 of .*: expected an object"),
        (SPEED | {"at_lest": 3}, "got 'at_lest'"),
        (SPEED | {"row": "decoding"}, "row: expected one of decode, got 'decoding'"),
        (SPEED | {"figure": 3}, "figure: expected a text, got 3"),
        (SPEED | {"at_most": 3}, "expected either at_least or at_most, got at_least and at_most"),
        ({"row": "decode", "case": "", "figure": "speed"}, "got neither"),
        (SPEED | {"at_least": "3"}, "at_least: expected a number, got '3'"),
        (SPEED | {"at_least": True}, "at_least: expected a number, got True"),
        (SPEED | {"shape": 8}, "shape: expected an object, got 8"),
    ],
)
def test_mistakes_in_an_entry(tmp_path: Path, entry: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        read_targets(written(tmp_path, SPEED, entry), ["decode"])


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "dsa bench 1", "targets": []}', "not JSON"])
def test_another_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match="targets: "):
        read_targets(tmp_path / "other.json", ["decode"])
