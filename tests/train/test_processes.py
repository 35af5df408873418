"""Two processes against one on the same sequences, and errors that all of them hear."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

from dsa.testing.training import read_log
from dsa.train import start_processes

SCRIPT = """
import sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
from dsa.testing.training import SETTINGS, attached, document_tokens, random_tokens
from dsa.train import Holdout, SparseSettings, start_processes, train_indexers, train_sparse
stage, out = sys.argv[1:]
processes, _ = start_processes("cpu")
stream = document_tokens()
others = dict(processes=processes, holdout=Holdout.of(random_tokens(seed=5), 64, 1), checkpoint_every=3)
try:
    if stage == "warmup":
        train_indexers(attached(), stream, out, replace(SETTINGS, sequences=2), **others)
    else:
        settings = SparseSettings(steps=4, seq_len=48, all_parameters=True, lr=1e-3, sequences=2, index_queries=16)
        train_sparse(attached(), stream, out, settings, **others)
except OSError as error:
    print("heard", error)
    sys.exit(3)
"""


def start(world: int, *arguments: str) -> list[tuple[int, str]]:
    """Runs the script in so many processes; exit code and output of each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    processes = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SCRIPT, *arguments]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return [(process.communicate(timeout=240)[0], process.returncode)[::-1] for process in processes]


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_two_processes_have_the_losses_of_one(tmp_path: Path, stage: str) -> None:
    for world in (1, 2):
        for code, output in start(world, stage, str(tmp_path / str(world))):
            assert code == 0, output
    one, two = (read_log(tmp_path / str(world)) for world in (1, 2))
    assert len(one) == len(two) > 3
    for ours, theirs in zip(one, two):
        assert ours.get("language") == pytest.approx(theirs.get("language"), abs=1e-4)
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-4)
        assert (ours["tokens"], ours["lr"]) == (theirs["tokens"], theirs["lr"])
    held = [json.loads((tmp_path / name / "holdout.jsonl").read_text().splitlines()[-1]) for name in "12"]
    assert held[0]["sparse"] == pytest.approx(held[1]["sparse"], abs=1e-4)


def test_an_error_of_the_main_process_ends_all(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for code, output in start(2, "warmup", str(tmp_path)):
        assert code == 3, output
        assert "is not empty; choose another one" in output


def test_models_split_over_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(NotImplementedError, match="does not split a model over devices with FSDP"):
        start_processes()


def test_several_processes_need_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="training in several processes needs the package accelerate"):
        start_processes()
