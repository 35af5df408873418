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
        (("--tokens", "8", "--top-k", "0"), "--top-k must be at least 1, got 0"),
        (("--tokens", "8", "--top-k", "4", "--json", "/nowhere/x.json"), "there is no directory /nowhere"),
    ],
)
def test_mistakes(dsa: Run, arguments: tuple[str, ...], expected: str) -> None:
    result = dsa("cost", *arguments)
    assert result.exit_code == 2
    assert expected in result.stderr


def test_a_model(dsa: Run, tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    result = dsa("cost", "--model", "deepseek-v3.2", "--tokens", "131072", "--share", "4", "--json", str(file))
    assert result.exit_code == 0, result.output
    for said in ("one decoded token at 131,072 tokens", "index scan", "shared MAC", "absorbed", "36.6 G of them"):
        assert said in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= max(80, len(f"Figures written to {file}"))
    figures = json.loads(file.read_text())
    assert set(figures["variants"]) == {"dense", "dsa", "shared"}
    assert figures["variants"]["dsa"]["token"]["index_scan"]["cache_read"] == 61 * 131072 * 132
    assert figures["crossing"]["dsa"]["token_multiply_adds"] > 2048
    assert figures["pair_reduction"] == 64


def test_a_model_on_disk(dsa: Run, tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "cost.png"
    result = dsa("cost", "--model", tiny, "--tokens", "500", "--top-k", "64", "--plot", str(plot))
    assert result.exit_code == 0, result.output
    assert "comes with no DSA: counted are 4 index heads of 32 and K = 64" in result.stderr
    assert "756 tokens are more than the 256 positions" in result.stderr
    assert plot.stat().st_size > 1000


def test_the_default_model_with_a_price(dsa: Run, tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    arguments = ("--price", "3.6", "--decode-speed", "100,400", "--json", str(file))
    result = dsa("cost", "--model", "default", "--tokens", "8192", *arguments)
    assert result.exit_code == 0, result.output
    assert "4.00x" in result.stdout
    money = json.loads(file.read_text())["money"]
    assert money["decode"]["dense_per_million"] == pytest.approx(10)
    assert "prefill" not in money


def test_measured_speeds_with_a_price(dsa: Run, tmp_path: Path) -> None:
    bench = tmp_path / "e2e.json"
    timings = {"SDPA prefill": {"median_s": 8.192}, "DSA prefill": {"median_s": 4.096}}
    bench.write_text(json.dumps({"rows": [{"name": "prompt", "length": 8192, "timings": timings}]}))
    arguments = ("--model", "default", "--price", "3.6", "--measured", str(bench))
    same, other = dsa("cost", *arguments, "--tokens", "8192"), dsa("cost", *arguments, "--tokens", "9000")
    assert same.exit_code == other.exit_code == 0, same.output + other.output
    assert "1.000   0.500     2.00x" in same.stdout
    assert "those at 8,192" not in same.stderr
    assert "has no prefill of 9,000 tokens" in " ".join(other.stderr.split())


def test_the_published_curve(dsa: Run, tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    result = dsa("cost", "--published", "--json", str(file))
    assert result.exit_code == 0, result.output
    for said in ("about 8.7x", "decode, 1 position a step", "Assumed:", "$2.00 an hour"):
        assert said in result.stdout
    assert len(json.loads(file.read_text())["points"]) == 10


def test_compact_caches(dsa: Run, tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    options = ("--cache", "fp8", "--index-dtype", "fp8", "--json", str(file))
    result = dsa("cost", "--model", "DeepSeek-V3.2", "--tokens", "131072", "--decoded", "0", *options)
    assert result.exit_code == 0, result.output
    said = "a cached token takes an FP8 row of 656 bytes a layer, and an fp8 index key of 132"
    assert said in " ".join(result.stdout.split())
    held = json.loads(file.read_text())["variants"]["dsa"]["memory"]
    assert (held["keys_and_values"], held["index_keys"]) == (131072 * 61 * 656, 131072 * 61 * 132)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "tokens: expected a number of tokens; add --tokens N"),
        (("--tokens", "8"), "--top-k: expected a number of tokens; add --top-k N"),
        (("--tokens", "8", "--top-k", "4", "--price", "2"), "error: --price needs a model: add --model"),
        (("--model", "Qwen3-9B", "--tokens", "8"), "no preset 'Qwen3-9B'; near it are Qwen3-8B"),
        (("--model", "default"), "add --tokens N"),
        (("--model", "default", "--tokens", "8", "--price", "-1", "--decode-speed", "1,2"), "price must be a number"),
        (("--model", "default", "--tokens", "8", "--price", "1"), "a price needs speeds"),
        (("--model", "default", "--tokens", "8", "--decode-speed", "1,2"), "--decode-speed needs a price"),
        (
            ("--model", "default", "--tokens", "8", "--price", "1", "--decode-speed", "1"),
            "DENSE,DSA in tokens a second",
        ),
        (("--model", "default", "--tokens", "8", "--cache-bytes", "0"), "of the cache must be above 0, got 0"),
        (("--tokens", "8", "--top-k", "4", "--cache", "fp8"), "error: --cache needs a model: add --model"),
        (("--model", "Qwen3-8B", "--tokens", "8", "--cache", "fp8"), "Qwen3-8B caches keys and values"),
        (("--model", "DeepSeek-V3.2", "--tokens", "8", "--cache", "int4"), "cache must be full or fp8, got 'int4'"),
        (("--model", "DeepSeek-V3.2", "--tokens", "8", "--index-dtype", "bf16"), "--index-dtype must be one of"),
        (("--model", "default", "--tokens", "8", "--plot", "x.txt"), "expected a file name that ends in .png"),
        (("--model", "default", "--tokens", "8", "--decoded", "-1"), "decoded must not be negative"),
        (("--published", "--tokens", "8"), "--tokens does nothing with --published"),
        (("--published", "--positions", "0"), "positions_a_step must be a number above 0"),
    ],
)
def test_mistakes_about_models(dsa: Run, arguments: tuple[str, ...], expected: str) -> None:
    result = dsa("cost", *arguments)
    assert result.exit_code == 2, result.output
    assert expected in " ".join(result.stderr.split())
    assert not result.stdout


def test_a_corrupt_configuration(dsa: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    result = dsa("cost", "--model", str(tmp_path), "--tokens", "8")
    assert result.exit_code == 2
    assert "is not JSON (" in result.stderr
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 32}')
    result = dsa("cost", "--model", str(tmp_path), "--tokens", "8")
    assert "the field 'num_hidden_layers' is missing" in result.stderr
