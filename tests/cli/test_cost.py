"""`dsa cost`: what it prints and writes, and what it says to mistakes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]


def test_table_and_json(dsa: Run, tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    result = dsa("cost", "--tokens", "100000", "--top-k", "1000", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "100.0x" in result.stdout
    assert "50.3x" in result.stdout
    figures = json.loads(file.read_text())
    assert figures["attention_pairs_dense"] == 10_000_000_000
    assert figures["attention_pairs_dsa"] == 100_000_000
    assert figures["pair_reduction"] == 100
    assert figures["pair_reduction_causal"] == pytest.approx(50.25, abs=0.01)


def test_a_budget_that_leaves_nothing_out(dsa: Run) -> None:
    result = dsa("cost", "--tokens", "100", "--top-k", "1000")
    assert result.exit_code == 0
    assert "leaves nothing out" in result.stderr
    assert "1.0x" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--tokens", "0", "--top-k", "8"), "tokens must be at least 1, got 0"),
        (("--tokens", "8", "--top-k", "0"), "top_k must be at least 1, got 0"),
        (("--tokens", "8", "--top-k", "4", "--json", "/nowhere/x.json"), "there is no directory /nowhere"),
    ],
)
def test_mistakes(dsa: Run, arguments: tuple[str, ...], expected: str) -> None:
    result = dsa("cost", *arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
