"""Two processes against one on the same sequences, and errors that all of them hear."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

from dsa.testing.training import launch, read_log
from dsa.train import start_processes

SCRIPT = """
import sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
from dsa.testing.tiny_models import tiny_model
from dsa.testing.training import SETTINGS, attached, document_tokens, random_tokens
from dsa.train import DenseSettings, Holdout, RunOptions, SparseSettings, start_processes
from dsa.train import train_dense, train_indexers, train_sparse
stage, out = sys.argv[1:]
processes, _ = start_processes("cpu")
stream = document_tokens()
options = RunOptions(processes=processes, holdout=Holdout.of(random_tokens(seed=5), 64, 1), checkpoint_every=3)
try:
    if stage == "warmup":
        train_indexers(attached(), stream, out, replace(SETTINGS, sequences=2), options)
    elif stage == "dense":
        settings = DenseSettings(steps=4, seq_len=48, lr=1e-3, sequences=2, expert_bias_rate=0.01)
        train_dense(tiny_model("deepseek_v3"), stream, out, settings, options)
    else:
        settings = SparseSettings(steps=4, seq_len=48, all_parameters=True, lr=1e-3, sequences=2, queries_per_update=16)
        train_sparse(attached(), stream, out, settings, options)
except OSError as error:
    print("heard", error)
    sys.exit(3)
"""


@pytest.mark.parametrize("stage", ["warmup", "sparse", "dense"])
def test_two_processes_have_the_losses_of_one(tmp_path: Path, stage: str) -> None:
    for world in (1, 2):
        for code, output in launch(world, SCRIPT, stage, str(tmp_path / str(world))):
            assert code == 0, output
    one, two = (read_log(tmp_path / str(world)) for world in (1, 2))
    assert len(one) == len(two) > 3
    for ours, theirs in zip(one, two):
        assert ours.get("language") == pytest.approx(theirs.get("language"), abs=1e-4)
        assert ours.get("kl") == pytest.approx(theirs.get("kl"), abs=1e-4)
        assert (ours["tokens"], ours["lr"]) == (theirs["tokens"], theirs["lr"])
    held = [json.loads((tmp_path / name / "holdout.jsonl").read_text().splitlines()[-1]) for name in "12"]
    assert held[0]["dense"] == pytest.approx(held[1]["dense"], abs=1e-4)
    assert held[0].get("sparse") == pytest.approx(held[1].get("sparse"), abs=1e-4)


def test_an_error_of_the_main_process_ends_all(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for code, output in launch(2, SCRIPT, "warmup", str(tmp_path)):
        assert code == 3, output
        assert "is not empty; choose another one" in output


def test_models_split_over_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(NotImplementedError, match="does not split a model over devices with DEEPSPEED"):
        start_processes()


def test_fsdp_of_the_launcher_must_be_version_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for version in (None, "1"):
        if version is not None:
            monkeypatch.setenv("FSDP_VERSION", version)
        with pytest.raises(NotImplementedError, match=r"shards models with FSDP version 2 only.*`fsdp_version: 2`"):
            start_processes()
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="--shard shares the model's weights out among several processes"):
        start_processes()
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(NotImplementedError, match="`fsdp_offload_params: false`"):
        start_processes()


def test_one_process_has_nobody_to_share_with() -> None:
    with pytest.raises(ValueError, match="this is the only one: start them with `torchrun"):
        start_processes("cpu", shard=True)


def test_several_processes_need_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="training in several processes needs the package accelerate"):
        start_processes()
