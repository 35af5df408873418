"""`dsa calibrate` end to end on a tiny model: what it prints and saves, and what it says to mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import Result

import dsa as library
from dsa.cli.calibrate import parse_budgets
from dsa.models import config_of

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def indexers(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    torch.manual_seed(0)
    library.attach(model, top_k=16, local=2, sinks=1, index_heads=2, index_head_dim=8)
    return str(library.save_indexers(model, tmp_path_factory.mktemp("indexers"), trained=True))


@pytest.fixture
def short(tmp_path: Path) -> str:
    """A text within the tiny model's 256 positions."""
    file = tmp_path / "short.txt"
    file.write_text("All work and no play, and then some more of the same. " * 4)
    return str(file)


def flat(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_from_text_to_generation(dsa: Run, tiny: str, indexers: str, short: str, tmp_path: Path) -> None:
    out, figures, whole = tmp_path / "tuned", tmp_path / "found.json", tmp_path / "model"
    options = ("--top-k", "4,8,16,32", "--max-dense", "0", "--perplexity-ratio", "3")
    result = dsa(
        "calibrate", tiny, "--indexers", indexers, "--data", short, *options,
        "--out", str(out), "--save-model", str(whole), "--json", str(figures), "--compare-uniform",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "to go" in result.stderr
    assert "Proposal 1:" in result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 160
    printed = flat(result.stdout)
    for part in (
        "mass kept",
        "Perplexity ratio to dense:",
        "A query reads",
        "One K for all layers",
        "was chosen on this",
    ):
        assert part in printed
    found = json.loads(figures.read_text())
    assert found["perplexity_ratio"] <= 3
    config = library.DSAConfig.from_dict(found["config"])
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert library.attach(model, indexers=out).config == config
    assert config_of(AutoModelForCausalLM.from_pretrained(whole)) == config

    generated = dsa("generate", tiny, "--indexers", str(out), "--file", short, "--max-new-tokens", "4")
    assert generated.exit_code == 0, generated.output
    evaluated = dsa("eval", tiny, "--indexers", str(out), "--file", short, "--json", str(tmp_path / "eval.json"))
    assert evaluated.exit_code == 0, evaluated.output
    assert json.loads((tmp_path / "eval.json").read_text())["config"] == found["config"]

    again = dsa("calibrate", tiny, "--indexers", indexers, "--data", short, *options, "--out", str(out))
    assert again.exit_code == 2
    assert "is there already" in flat(again.stderr)


def test_a_proposal_only(dsa: Run, tiny: str, indexers: str, short: str) -> None:
    result = dsa("calibrate", tiny, "--indexers", indexers, "--data", short, short, "--mass", "0.1", "--no-share")
    assert result.exit_code == 0, result.output
    assert "Nothing was saved" in result.stdout
    assert "2 layers select, 0 share, 0 are dense" in flat(result.stdout)


def test_texts_beyond_the_models_positions(dsa: Run, tiny: str, indexers: str, text: str, tmp_path: Path) -> None:
    options = ("--indexers", indexers, "--data", text, "--mass", "0.1", "--rope-scaling", "linear:2")
    result = dsa("calibrate", tiny, *options, "--out", str(tmp_path / "tuned"))
    assert result.exit_code == 0, result.output
    assert "324 tokens are more than" not in result.stderr
    evaluated = dsa("eval", tiny, "--indexers", str(tmp_path / "tuned"), "--file", text)
    assert evaluated.exit_code == 0, evaluated.output
    assert "324 tokens are more than" not in evaluated.stderr


def test_budgets() -> None:
    assert parse_budgets(None) is None
    assert parse_budgets("256, 1_024") == (256, 1024)
    for text in ("", "256;512", "-1", "many"):
        with pytest.raises(ValueError, match="top-k must be whole numbers"):
            parse_budgets(text)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give either mass (0.98, say) or perplexity-ratio (1.005, say) as the target, got neither"),
        (["--mass", "0.9", "--perplexity-ratio", "1.1"], "got both"),
        (["--mass", "98"], "must lie between 0 and 1, got 98.0"),
        (["--perplexity-ratio", "0.9"], "must be above 1, got 0.9"),
        (["--mass", "0.9999", "--top-k", "4", "--max-dense", "0"], "mass: 0.9999 is not reachable with K up to 4"),
        (["--perplexity-ratio", "1.000001", "--top-k", "4", "--max-dense", "0"], "the nearest came to"),
        (["--mass", "0.5", "--top-k", "2"], "top-k: 2 is below the 1 sinks and 2 local tokens"),
        (["--mass", "0.5", "--top-k", "5000"], "top-k: 5,000 is not below the text's 216 tokens"),
        (["--mass", "0.5", "--top-k", "some"], "top-k must be whole numbers"),
        (["--mass", "0.5", "--tokens", "1000"], "has only 216 tokens, 1,000 were asked for"),
        (["--mass", "0.5", "--data", "{folder}/empty.txt"], "data: {folder}/empty.txt is empty"),
        (["--mass", "0.5", "--data", "{folder}/none.txt"], "data: there is no file"),
        (["--mass", "0.5", "--verify", "{folder}/none.txt"], "verify: there is no file"),
        (["--mass", "0.5", "--json", "{folder}/no/out.json"], "json: there is no directory"),
        (["--mass", "0.5", "--out", "{folder}/x.bin"], "out: expected a folder or a .safetensors file"),
        (["--mass", "0.5", "--max-dense", "-1"], "max-dense must be at least 0"),
        (["--mass", "0.5", "--min-shared", "2"], "min-shared is a share of the layers"),
        (["--mass", "0.5", "--indexers", "{folder}/none"], "indexers: no file at"),
    ],
)
def test_mistakes(
    dsa: Run, tiny: str, indexers: str, short: str, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    given = [argument.format(folder=tmp_path) for argument in arguments]
    own = [] if "--indexers" in given else ["--indexers", indexers]
    result = dsa("calibrate", tiny, *own, "--data", short, *given)
    assert result.exit_code == 2, result.output
    assert expected.format(folder=tmp_path) in flat(result.stderr)
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_untrained_indexers(dsa: Run, tiny: str, short: str) -> None:
    result = dsa("calibrate", tiny, "--data", short, "--mass", "0.5")
    assert result.exit_code == 2
    assert "are untrained, so there is nothing to calibrate" in flat(result.stderr)
