"""`dsa train`: YAML, the sparse stage, held-out text, TensorBoard, starting from existing indexers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import Result

from dsa.cli.configuration import read_config, write_config
from dsa.models.checkpoint import read_indexers
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

SIZES = ("--index-heads", "2", "--index-head-dim", "8", "--sinks", "1", "--local", "4", "--top-k", "16")
SHORT = ("--seq-len", "48", "--threads", "1", "--device", "cpu", "--steps", "3")
WORDS = "all work and no play makes for a dull day, and so it goes on and on. "


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": WORDS * (number + 1)}) + "\n" for number in range(9)))
    return str(path)


def fine(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def test_one_yaml_or_the_same_flags(dsa: Callable[..., Result], tiny: str, rows: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    options = {
        "model": tiny,
        "data": rows,
        "column": "body",
        "steps": 3,
        "seq-len": 48,
        "dense-layers": [1],
        "index_heads": 2,
        "index_head_dim": 8,
        "sinks": 1,
        "local": 4,
        "top_k": 16,
        "schedule": "wsd",
        "boundaries": False,
        "device": "cpu",
        "threads": 1,
    }
    recipe.write_text(yaml.safe_dump(options))
    fine(dsa("train", "--config", str(recipe), "--out", str(tmp_path / "a")))
    flags = ("--column", "body", "--dense-layers", "1", "--schedule", "wsd", "--no-boundaries")
    fine(dsa("train", tiny, "--data", rows, "--out", str(tmp_path / "b"), *flags, *SIZES, *SHORT))
    fine(dsa("train", "--config", str(tmp_path / "a" / "run.yaml"), "--out", str(tmp_path / "c"), "--seed", "0"))
    logs = [[json.loads(line)["kl"] for line in (tmp_path / name / "log.jsonl").open()] for name in "abc"]
    assert logs[0] == logs[1] == logs[2]
    assert list(logs[0][0]) == ["0"]
    other = fine(dsa("train", "--config", str(recipe), "--out", str(tmp_path / "d"), "--steps", "2"))
    assert "2 steps done" in other.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\nstep: 4", "'step', which the command does not know; did you mean steps?"),
        ("- steps", "must hold `name: value` lines, got list"),
        ("a: [1", "is not YAML in line"),
        ("steps: {a: 1}", "steps in .* must be a single value"),
        ("config: other.yaml", "'config', which the command does not know"),
    ],
)
def test_configurations_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(path, ["steps", "data", "config"], {"data"})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        write_config({"data": ["a"], "steps": 3, "lora": None, "resume": True, "out": Path("x"), "boundaries": False})
    )
    expected = {"data": ["a"], "steps": 3, "out": "x", "boundaries": False}
    assert read_config(path, list(expected), {"data"}) == expected


def test_held_out_text_and_tensorboard(dsa: Callable[..., Result], tiny: str, rows: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    more = ("--column", "body", "--holdout", rows, "--holdout-every", "2", "--tensorboard")
    result = fine(
        dsa("train", tiny, "--data", rows, "--out", str(out), *more, *SIZES, *SHORT, "--dense-layers", "none")
    )
    lines = [json.loads(line) for line in (out / "holdout.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 2, 3]
    for line in lines:
        assert set(line["recall"]) == {"0", "1"}
        assert all(0 < line["mass"][layer] <= line["oracle"][layer] + 1e-6 for layer in "01")
    assert "holdout: perplexity" in result.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/kl_mean", "train/tokens_per_s", "train/memory_mb", "kl/layer_001", "holdout/mass_mean"} <= tags
    assert {"holdout_mass/layer_000", "holdout_recall/layer_001", "holdout/perplexity_ratio"} <= tags
    assert [event.step for event in events.Scalars("train/kl_mean")] == [1, 2, 3]


def test_existing_indexers_are_trained_on(dsa: Callable[..., Result], tiny: str, rows: str, tmp_path: Path) -> None:
    common = ("train", tiny, "--data", rows, "--column", "body", *SHORT)
    fine(dsa(*common, *SIZES, "--dense-layers", "1", "--out", str(tmp_path / "a")))
    fine(dsa(*common, "--indexers", str(tmp_path / "a"), "--top-k", "12", "--out", str(tmp_path / "b")))
    config = read_indexers(tmp_path / "b").config
    assert (config.index_heads, config.top_k, config.is_dense(1)) == (2, 12, True)
    first = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["kl_mean"] for name in "ab"]
    assert first[1] < first[0]


def test_the_sparse_stage(dsa: Callable[..., Result], tiny: str, rows: str, tmp_path: Path) -> None:
    common = ("train", tiny, "--data", rows, "--column", "body", *SHORT)
    nothing = dsa(*common, "--stage", "sparse", "--all-parameters", "--out", str(tmp_path / "x"))
    assert nothing.exit_code == 2
    assert "the sparse stage needs trained indexers" in nothing.stderr
    fine(dsa(*common, *SIZES, "--dense-layers", "1", "--out", str(tmp_path / "a")))
    sparse = (*common, "--stage", "sparse", "--indexers", str(tmp_path / "a"))
    nobody = dsa(*sparse, "--out", str(tmp_path / "x"))
    assert nobody.exit_code == 2
    assert "--lora RANK, --all-parameters, --parameters PATTERN" in nobody.stderr
    out = tmp_path / "b"
    more = ("--all-parameters", "--distill", "0.5", "--gradient-checkpointing", "--queries-per-update", "16")
    result = fine(dsa(*sparse, *more, "--out", str(out)))
    assert result.stdout.split() == [str(out / "indexers.safetensors"), str(out / "model")]
    assert "loss" in result.stderr
    (tmp_path / "text.txt").write_text(WORDS * 8)
    fine(dsa("eval", str(out / "model"), "--file", str(tmp_path / "text.txt"), "--tokens", "200", "--threads", "1"))


def test_adapters(dsa: Callable[..., Result], tiny: str, rows: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    common = ("train", tiny, "--data", rows, "--column", "body", *SHORT)
    fine(dsa(*common, *SIZES, "--dense-layers", "1", "--out", str(tmp_path / "a")))
    sparse = (*common, "--stage", "sparse", "--indexers", str(tmp_path / "a"), "--lora", "2")
    fine(dsa(*sparse, "--out", str(tmp_path / "b")))
    assert (tmp_path / "b" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "b" / "model").exists()


@pytest.mark.parametrize(
    ("stage", "option", "belongs"),
    [
        ("warmup", ("--lora", "4"), "sparse stage; add --stage sparse"),
        ("warmup", ("--distill", "1"), "sparse stage; add --stage sparse"),
        ("warmup", ("--gradient-checkpointing",), "sparse and dense stage; add --stage sparse"),
        ("warmup", ("--merge",), "sparse stage; add --stage sparse"),
        ("warmup", ("--from-scratch",), "dense stage; add --stage dense"),
        ("sparse", ("--expert-bias-rate", "0.1"), "dense stage; add --stage dense"),
        ("sparse", ("--start", "fitted"), "warmup stage; add --stage warmup"),
        ("dense", ("--top-k", "8"), "warmup and sparse stage; add --stage warmup"),
        ("dense", ("--indexers", "x"), "warmup and sparse stage; add --stage warmup"),
        ("dense", ("--lora", "4"), "sparse stage; add --stage sparse"),
    ],
)
def test_options_without_effect_are_refused(
    dsa: Callable[..., Result], tiny: str, rows: str, tmp_path: Path, stage: str, option: tuple[str, ...], belongs: str
) -> None:
    result = dsa("train", tiny, "--data", rows, "--out", str(tmp_path / "a"), *SHORT, "--stage", stage, *option)
    assert result.exit_code == 2
    assert f"{option[0]} belongs to the {belongs}" in result.stderr


def test_from_a_configuration_to_a_model_with_indexers(dsa: Callable[..., Result], rows: str, tmp_path: Path) -> None:
    """Random weights, dense stage, warm-up, sparse stage; and the dense continuation on the same windows."""
    config = tmp_path / "config"
    tiny_model("deepseek_v3", vocab_size=BYTE_VOCABULARY).config.save_pretrained(config)
    tiny_tokenizer().save_pretrained(config)
    common = ("--data", rows, "--column", "body", *SHORT)
    missing = dsa("train", str(config), *common, "--stage", "dense", "--out", str(tmp_path / "x"))
    assert missing.exit_code == 2
    assert "`dsa train --stage dense --from-scratch` begins" in missing.stderr
    scratch = ("train", str(config), *common, "--stage", "dense", "--from-scratch", "--expert-bias-rate", "0.01")
    held = ("--holdout", rows, "--holdout-sequences", "1")
    result = fine(dsa(*scratch, *held, "--out", str(tmp_path / "dense")))
    assert result.stdout.split() == [str(tmp_path / "dense" / "model")]
    assert "3 steps done, loss of the last step" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "dense" / "log.jsonl").open()]
    assert [line["tokens"] for line in lines] == [48, 96, 144]
    assert max(line["lr"] for line in lines) == pytest.approx(1e-3, rel=0.3)
    fine(dsa(*scratch, *held, "--out", str(tmp_path / "dense"), "--resume"))
    other = dsa(*scratch, *held, "--out", str(tmp_path / "dense"), "--resume", "--seed", "1")
    assert other.exit_code == 2
    assert "seed was 0, is now 1" in other.stderr

    model = str(tmp_path / "dense" / "model")
    sizes = ("--index-heads", "2", "--index-head-dim", "8", "--top-k", "16")
    fine(dsa("train", model, *common, *sizes, "--out", str(tmp_path / "warmup")))
    sparse = ("--stage", "sparse", "--indexers", str(tmp_path / "warmup"), "--all-parameters", "--lr", "1e-4")
    fine(dsa("train", model, *common, *sparse, "--out", str(tmp_path / "sparse")))
    fine(dsa("train", model, *common, "--stage", "dense", "--lr", "1e-4", "--out", str(tmp_path / "continued")))
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("sparse", "continued")]
    assert [line["lr"] for line in logs[0]] == [line["lr"] for line in logs[1]]
    # Below K tokens nothing is left out; the rest of a window makes little difference after so few steps.
    assert logs[0][0]["language"] == pytest.approx(logs[1][0]["language"], rel=1e-2)

    again = dsa("train", str(tmp_path / "sparse" / "model"), *common, "--stage", "dense", "--out", str(tmp_path / "y"))
    assert "the model was saved with indexers; it is trained, and saved, without them" in fine(again).stderr


def test_sequences_beyond_the_model_s_positions(
    dsa: Callable[..., Result], tiny: str, rows: str, tmp_path: Path
) -> None:
    long = ("--column", "body", "--seq-len", "400", "--steps", "1", "--device", "cpu", "--threads", "1")
    args = ("train", tiny, "--data", rows, "--out", str(tmp_path / "a"), "--no-boundaries", *long, *SIZES)
    result = fine(dsa(*args, "--rope-scaling", "yarn:2"))
    assert "extrapolated" not in result.stderr
    assert read_indexers(tmp_path / "a").base_model["rope_scaling"]["factor"] == 2.0
    other = dsa(*args, "--rope-scaling", "yarn:4", "--resume")
    assert other.exit_code == 2
    assert "model.rope_scaling.factor was 2.0, is now 4.0" in other.stderr
    (tmp_path / "text.txt").write_text(WORDS * 8)
    common = ("eval", tiny, "--file", str(tmp_path / "text.txt"), "--tokens", "400", "--threads", "1")
    measured = fine(dsa(*common, "--indexers", str(tmp_path / "a")))
    assert "extrapolated" not in measured.stderr


def test_the_warm_up_needs_base_dependencies_only(tiny: str, rows: str, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('accelerate', 'datasets', 'peft', 'tensorboard', 'pyarrow', 'pandas'): sys.modules[name] = None\n"
        "from dsa.cli.main import run\n"
        "run()\n"
    )
    args = ["train", tiny, "--data", rows, "--column", "body", "--holdout", rows, *SIZES, *SHORT]
    finished = subprocess.run(
        [sys.executable, "-c", script, *args, "--out", str(tmp_path / "a")], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    board = subprocess.run(
        [sys.executable, "-c", script, *args, "--tensorboard", "--out", str(tmp_path / "b")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert board.returncode == 2
    assert "for TensorBoard needs the package tensorboard: pip install 'dsa-attention[train]'" in board.stderr
