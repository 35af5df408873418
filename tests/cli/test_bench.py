"""`dsa bench` at tiny sizes: what it prints, writes and refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from dsa.bench import agreement

Run = Callable[..., Result]

OPS = ("machine", "decode", "prefill", "memory", "index", "crossover", "loss", "quantize")


def flat(text: str) -> str:
    """Text without the line breaks that fitting it to the terminal put in."""
    return " ".join(text.split())


def test_all_operations(dsa: Run, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    result = dsa("bench", "ops", "--quick", "--data", "gaussian", "--json", str(out), "--threads", "1")
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert tuple(dict.fromkeys(row["name"] for row in rows)) == OPS
    for row in rows:
        assert row["environment"]["threads"] == 1
        assert {"commit", "machine", "isa", "torch", "implementations", "date"} <= set(row["environment"])
        assert row["checks"] or row["name"] == "machine"
        assert row["name"] in result.stdout
    assert "SDPA / DSA" in result.stdout
    assert "Checked against the reference" in result.stdout
    assert max(map(len, result.stdout.replace(str(out), "").splitlines())) <= 80
    assert "\x1b" not in result.output


def test_tensors_recorded_from_a_model(dsa: Run, tiny: str) -> None:
    options = ("--quick", "--only", "prefill", "--data", "recorded", "--lengths", "100", "--model", tiny)
    result = dsa("bench", "ops", *options)
    assert result.exit_code == 0, result.output
    assert "prefill, n = 100, recorded" in result.stdout
    assert f"of {tiny} reading the Python language reference" in flat(result.stdout)


def test_results_are_merged_and_shown(dsa: Run, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    common = ("bench", "ops", "--quick", "--only", "prefill", "--data", "gaussian", "--json", str(out))
    for lengths in ("64,96", "96,128"):
        assert dsa(*common, "--lengths", lengths).exit_code == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["length"] for row in rows] == [64, 96, 128]
    shown = dsa("bench", "show", str(out))
    assert shown.exit_code == 0, shown.output
    for length in (64, 96, 128):
        assert f"prefill, n = {length}, gaussian" in shown.stdout


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_curves(dsa: Run, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / f"curves.{ending}"
    options = ("--quick", "--only", "prefill", "--data", "gaussian", "--plot", str(out))
    result = dsa("bench", "ops", *options, "--lengths", "64,96")
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 1000
    alone = dsa("bench", "ops", *options, "--lengths", "64")
    assert "No curves to draw" in alone.stdout


def test_nothing_is_printed_where_results_disagree(dsa: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(agreement, "_attend", lambda tensors, row, positions: torch.ones(9, 64).double())
    out = tmp_path / "results.json"
    options = ("--quick", "--only", "prefill", "--data", "gaussian", "--json", str(out))
    result = dsa("bench", "ops", *options)
    assert result.exit_code == 1
    assert "differs from the reference" in flat(result.stderr)
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ops", "--only", "nothing"], "only: expected machine, decode,"),
        (["ops", "--lengths", "many"], "lengths: expected numbers of at least 2 tokens"),
        (["ops", "--lengths", "0"], "lengths: expected numbers of at least 2 tokens"),
        (["ops", "--data", "invented"], "data: expected recorded or gaussian"),
        (["ops", "--json", "{folder}"], "json: {folder} is a directory"),
        (["ops", "--json", "{folder}/other.json"], "holds no results of `dsa bench`"),
        (["ops", "--json", "{folder}/text.json"], "is not JSON"),
        (["ops", "--plot", "{folder}/curves.txt"], "plot: expected a file name that ends in"),
        (["ops", "--plot", "{folder}/no/curves.svg"], "plot: there is no directory"),
        (["ops", "--threads", "0"], "threads"),
        (["show", "{folder}/missing.json"], "No such file"),
    ],
)
def test_mistakes(
    dsa: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("dsa.bench.suites.run", lambda *args: pytest.fail("something was measured"))
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "text.json").write_text("not JSON")
    result = dsa("bench", *(argument.format(folder=tmp_path) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert expected.format(folder=tmp_path) in flat(result.stderr.replace("│", " "))
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_plot_without_matplotlib(dsa: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = dsa("bench", "ops", "--quick", "--plot", str(tmp_path / "curves.svg"))
    assert result.exit_code == 2
    assert "pip install 'dsa-attention[plot]'" in flat(result.stderr)
