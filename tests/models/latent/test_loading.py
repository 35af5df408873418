"""Models born with DSA from disk: nothing has to be said for them to run sparse, and damaged indexers are named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dsa
from dsa.cli.main import app
from dsa.models.loading import load_model
from dsa.models.sparse import attach_indexers
from dsa.testing.born_with_dsa import born_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "glm"
    born_model("glm_moe_dsa", vocab_size=BYTE_VOCABULARY).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_it_is_accelerated_without_being_told(saved: Path) -> None:
    loaded = load_model(str(saved), device="cpu")
    report, source = attach_indexers(loaded, top_k=5)
    assert dsa.is_accelerated(loaded.model)
    assert (report.config.top_k, report.trained, source) == (5, True, str(saved))
    assert attach_indexers(loaded)[0] is report
    with pytest.raises(ValueError, match="indexers of its own"):
        attach_indexers(loaded, "runs/other")


def test_generate_command(saved: Path) -> None:
    command = ["generate", str(saved), "--prompt", "What is kept?", "--max-new-tokens", "4", "--stats"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "GlmMoeDsaAttention replaced by LatentAttention" in result.stderr


def test_generate_with_a_compact_cache(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = ["generate", str(saved), "--prompt", "What is kept?", "--max-new-tokens", "4", "--json", str(out)]
    result = CliRunner().invoke(app, [*command, "--cache", "fp8", "--index-dtype", "fp8", "--stats"])
    assert result.exit_code == 0, result.output
    row, key = 20 + 4 + 2 * 8, 16 + 4
    assert f"a cache keeps FP8 rows of {row} bytes (112 as float32)" in result.stderr
    counted = json.loads(out.read_text())["counted"]["dsa"]
    tokens = 13 + 4 - 1
    assert (counted["keys_and_values"], counted["index_keys"]) == (tokens * 3 * row, tokens * 2 * key)


def test_a_kind_of_cache_that_there_is_not(saved: Path) -> None:
    result = CliRunner().invoke(app, ["generate", str(saved), "--prompt", "What?", "--cache", "int4"])
    assert result.exit_code == 2
    assert "cache must be one of full, fp8, got 'int4'" in result.stderr.replace("\n", " ")


def test_explain_command(saved: Path, tmp_path: Path) -> None:
    text, page = tmp_path / "text.txt", tmp_path / "report.html"
    text.write_text("What is kept of a long text, when every word may look back at a few others only? ")
    result = CliRunner().invoke(app, ["explain", str(saved), "--file", str(text), "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert page.stat().st_size > 10_000


@pytest.mark.parametrize("tasks", ["comparison", "perplexity,mass"])
def test_eval_command(saved: Path, tmp_path: Path, tasks: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is kept of a long text, when every word may look back at a few others only? " * 3)
    command = ["eval", str(saved), "--file", str(text), "--tasks", tasks, "--tokens", "80", "--top-k", "12"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "K = 12" in result.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["calibrate", "{model}", "--data", "{text}", "--mass", "0.9", "--out", "{out}"],
         "its layers were trained with their budget"),
        (["train", "{model}", "--data", "{text}", "--out", "{out}", "--steps", "1", "--seq-len", "32"],
         "its indexers are trained"),
    ],
    ids=lambda each: " ".join(each[:1]) if isinstance(each, list) else "",
)  # fmt: skip
def test_what_takes_other_models_only_says_so(saved: Path, tmp_path: Path, command: list[str], message: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is kept of a long text, when every word may look back at a few others only? " * 3)
    places = {"model": str(saved), "text": str(text), "out": str(tmp_path / "out")}
    result = CliRunner().invoke(app, [each.format(**places) for each in command])
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output


def test_a_missing_weight_is_named(saved: Path) -> None:
    change_weights(saved, lambda weights: weights.pop("model.layers.2.self_attn.indexer.wk.weight"))
    with pytest.raises(ValueError, match=r"model\.layers\.2\.self_attn\.indexer\.wk\.weight is missing"):
        load_model(str(saved), device="cpu")


def test_an_extra_weight_is_named(saved: Path) -> None:
    extra = {"model.layers.1.self_attn.indexer.wk.weight": torch.zeros(16, 48)}
    change_weights(saved, lambda weights: weights.update(extra))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.indexer\.wk\.weight in .* is no tensor"):
        load_model(str(saved), device="cpu")


def test_other_sizes_than_the_configuration(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "index_head_dim": 32}))
    with pytest.raises(ValueError, match=r"indexer\.\w+\.\w+ in .* is \[16\], but config\.json makes it \[32\]"):
        load_model(str(saved), device="cpu")
