"""`dsa train` end to end on a tiny model in a folder, and what it says to a user's mistakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import dsa
from dsa.cli import train as command
from dsa.cli.commands import spread
from dsa.cli.main import Commands
from dsa.cli.train_indexers import parse_layers
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

SIZES = ("--index-heads", "2", "--index-head-dim", "8", "--sinks", "1", "--local", "4", "--top-k", "16")
SHORT = ("--seq-len", "48", "--queries-per-update", "8", "--threads", "1", "--dense-layers", "none", "--device", "cpu")


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(cls=Commands)
    app.callback()(lambda: None)
    command.register(app)
    return app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=BYTE_VOCABULARY).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"document {number}: " + "all work and no play " * 30)
    return [str(folder / f"{number}.txt") for number in range(3)]


def call(app: typer.Typer, *args: object) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, args)])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("m --data a b c --steps 3", "m --data a --data b --data c --steps 3"),
        ("m --data a --data b c", "m --data a --data b --data c"),
        ("--steps 3 m --data=a --lr 1", "--steps 3 m --data=a --lr 1"),
        ("m --data a - --out d", "m --data a --data - --out d"),
        ("m --data", "m --data"),
        ("m --data --steps 3", "m --steps 3"),
        ("", ""),
    ],
)
def test_several_files_after_one_option(given: str, expected: str) -> None:
    assert spread("--data", given.split()) == expected.split()


@pytest.mark.parametrize(("text", "layers"), [("none", []), ("0", [0]), ("0,5-7", [0, 5, 6, 7]), (" 1 , 2-2", [1, 2])])
def test_layer_lists(text: str, layers: list[int]) -> None:
    assert parse_layers(text) == layers


def test_a_run_and_its_result(app: typer.Typer, model: Path, texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = call(app, model, "--data", *texts, "--steps", 3, "--out", out, *SIZES, *SHORT)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out / "indexers.safetensors")
    assert "LlamaForCausalLM: 2 indexers" in result.stderr
    assert "UNTRAINED" not in result.output
    assert "3 steps done, mean KL of the last step" in result.stderr
    report = dsa.attach(tiny_model("llama", vocab_size=BYTE_VOCABULARY), indexers=out)
    assert report.trained
    assert (report.config.top_k, report.config.sinks, report.config.local) == (16, 1, 4)

    again = call(app, model, "--data", *texts, "--steps", 3, "--out", out, *SIZES, *SHORT)
    assert again.exit_code == 2
    assert "holds a training run already; continue it with --resume" in again.stderr
    other = call(app, model, "--data", *texts, "--steps", 3, "--lr", 0.1, "--out", out, "--resume", *SIZES, *SHORT)
    assert other.exit_code == 2
    assert "--lr was 0.01, is now 0.1" in other.stderr
    done = call(app, model, "--data", *texts, "--steps", 3, "--out", out, "--resume", *SIZES, *SHORT)
    assert done.exit_code == 0


def test_a_run_resumed_with_another_length_names_the_option(
    app: typer.Typer, model: Path, texts: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = (model, "--data", *texts, "--steps", 1, "--out", out, *SIZES)
    assert call(app, *given, *SHORT).exit_code == 0
    other = call(app, *given, *SHORT[2:], "--seq-len", 64, "--resume")
    assert other.exit_code == 2
    assert "--seq-len was 48, is now 64. Give it" in other.stderr
    short = call(app, *given[: -len(SIZES)], "--seq-len", 64, "--resume", *SHORT[4:], "--local", 70)
    assert "--seq-len 64 leaves layer 0 nothing to learn" in short.stderr
    assert "seq_len" not in short.stderr


def test_nothing_selected_is_nothing_measured(app: typer.Typer, model: Path, texts: list[str], tmp_path: Path) -> None:
    sizes = ("--index-heads", 2, "--index-head-dim", 8, "--sinks", 1, "--local", 4)
    given = (model, "--data", *texts, "--steps", 1, "--holdout", texts[0], *sizes, *SHORT)
    result = call(app, *given, "--top-k", 48, "--out", tmp_path / "all")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert "sequences of 48 tokens fit into the budget of 48, so nothing is selected" in said
    assert "nothing was selected, so the indexers were not measured" in said
    assert "recall" not in said
    # By default something is.
    result = call(app, *given, "--out", tmp_path / "some")
    assert "nothing is selected" not in result.stderr
    assert "recall" in result.stderr
    assert dsa.attach(tiny_model("llama", vocab_size=BYTE_VOCABULARY), indexers=tmp_path / "some").config.top_k == 12


def test_layers_left_dense_and_a_model_saved_sparse(
    app: typer.Typer, model: Path, texts: list[str], tmp_path: Path
) -> None:
    sparse = tiny_model("llama", vocab_size=BYTE_VOCABULARY)
    dsa.attach(sparse, dsa.DSAConfig(top_k=8, sinks=1, local=2, index_heads=1, index_head_dim=4))
    sparse.save_pretrained(tmp_path / "sparse")
    tiny_tokenizer().save_pretrained(tmp_path / "sparse")
    short = [*SHORT[:-4], "--dense-layers", "0"]
    result = call(app, tmp_path / "sparse", "--data", *texts, "--steps", 1, "--out", tmp_path / "run", *SIZES, *short)
    assert result.exit_code == 0, result.output
    assert "new ones are trained in their place" in result.stderr
    assert "1 indexers" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--lr", "5"], "lr must lie between 0 and 1, got 5.0"),
        (["--steps", "0"], "steps must be a whole number of at least 1"),
        (["--warmup-steps", "3"], "--warmup-steps must be less than steps"),
        (["--dense-layers", "first"], "dense-layers must be layer numbers like 0,1,5-7, or none, got 'first'"),
        (["--dense-layers", "0,7"], "config.layers names layer 7"),
        (["--top-k", "3"], "--top-k must be at least sinks + local"),
        (["--seq-len", "5"], "--seq-len 5 leaves layer 0 nothing to learn"),
        (["--seq-len", "100000"], "less than one sequence"),
        (["--data", "gone.txt"], "there is no file gone.txt"),
        (["--target", "near"], "'near' is not one of"),
        (["--checkpoint-every", "0"], "checkpoint-every"),
    ],
)
def test_mistakes_end_with_a_message_and_code_2(
    app: typer.Typer, model: Path, texts: list[str], tmp_path: Path, changes: list[str], message: str
) -> None:
    result = call(app, model, "--data", *texts, "--steps", 3, "--out", tmp_path / "run", *SIZES, *SHORT, *changes)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(
    app: typer.Typer, model: Path, texts: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    args = ["train", str(model), "--data", *texts, "--steps", "100000", "--out", str(out), *SIZES, *SHORT]
    script = (
        "import sys, typer\n"
        "from dsa.cli import train\n"
        "from dsa.cli.main import Commands\n"
        "app = typer.Typer(cls=Commands)\n"
        "app.callback()(lambda: None)\n"
        "train.register(app)\n"
        "app()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, *args], stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    deadline = time.monotonic() + 240
    while not (log.is_file() and log.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "stopping after this step" in stderr
    assert "continue with the same command and --resume" in stderr
    assert "Traceback" not in stderr
    steps = log.read_bytes().count(b"\n")
    assert f"stopped after step {steps} of 100000" in stderr
