"""A run that was killed, stopped or failed goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsa
from dsa.runs import files
from dsa.testing.training import CONFIG, SETTINGS, Recorder, attached, random_tokens, read_log
from dsa.train import RunOptions, train_indexers

STATE, INDEXERS = "state.safetensors", "indexers.safetensors"


class Killed(Exception):
    """Stands for a kill: nothing in the trainer handles it."""


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """An uninterrupted run."""
    folder = tmp_path / "whole"
    train_indexers(attached(), random_tokens(), folder, SETTINGS, RunOptions(checkpoint_every=4))
    return folder


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_run(folder: Path, whole: Path) -> None:
    assert read_log(folder) == read_log(whole)
    assert same_weights(folder / INDEXERS, whole / INDEXERS)
    assert same_weights(folder / STATE, whole / STATE)


# After a step, in the middle of one (17 layers are 8 steps and a half), and before the first checkpoint with a step.
@pytest.mark.parametrize("layers", [1, 2, 6, 8, 9, 17])
def test_resume_is_exact_wherever_it_stopped(tmp_path: Path, whole: Path, layers: int) -> None:
    def kill(count: int) -> None:
        if count == layers:
            raise Killed

    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train_indexers(
            attached(),
            random_tokens(),
            folder,
            SETTINGS,
            RunOptions(checkpoint_every=4, reporter=Recorder(at_layer=kill)),
        )
    # Other random weights at the start: all must come from the checkpoint.
    train_indexers(attached(seed=9), random_tokens(), folder, SETTINGS, RunOptions(checkpoint_every=4, resume=True))
    assert_same_run(folder, whole)


def test_sigkill_in_the_middle(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    script = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from dsa.testing.training import SETTINGS, Recorder, attached, random_tokens\n"
        "from dsa.train import RunOptions, train_indexers\n"
        "slow = Recorder(at_layer=lambda count: time.sleep(0.2))\n"
        "options = RunOptions(checkpoint_every=4, reporter=slow)\n"
        "train_indexers(attached(), random_tokens(), sys.argv[1], SETTINGS, options)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stderr=subprocess.DEVNULL)
    log = folder / "log.jsonl"
    deadline = time.monotonic() + 240
    while not (log.is_file() and len(log.read_bytes().splitlines()) >= 6):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    recorder = Recorder()
    train_indexers(
        attached(), random_tokens(), folder, SETTINGS, RunOptions(checkpoint_every=4, resume=True, reporter=recorder)
    )
    assert recorder.begun == (4, 9, [0, 1])
    assert_same_run(folder, whole)


def test_half_a_log_line_and_leftovers_of_a_killed_writer_are_cleaned_up(tmp_path: Path, whole: Path) -> None:
    recorder = Recorder()
    stop = lambda: len(recorder.records) == 4  # noqa: E731
    folder = tmp_path / "run"
    train_indexers(attached(), random_tokens(), folder, SETTINGS, RunOptions(reporter=recorder, should_stop=stop))
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "tok')
    (folder / f".{STATE}.x1.part").write_bytes(b"half")
    (folder / f".{INDEXERS}.x2").write_bytes(b"half")
    train_indexers(attached(), random_tokens(), folder, SETTINGS, RunOptions(resume=True))
    assert_same_run(folder, whole)
    assert sorted(path.name for path in folder.iterdir()) == [INDEXERS, "log.jsonl", STATE]


def test_resuming_a_finished_run_changes_nothing(whole: Path) -> None:
    before = read_log(whole)
    (whole / INDEXERS).unlink()
    model = attached(seed=9)
    result = train_indexers(model, random_tokens(), whole, SETTINGS, RunOptions(resume=True))
    assert result.step == SETTINGS.steps
    assert read_log(whole) == before
    fresh = attached(seed=3)
    dsa.load_indexers(fresh, whole)
    for layer, indexer in dsa.models.indexers_of(fresh).items():
        trained = dsa.models.indexers_of(model)[layer]
        assert all(torch.equal(a, b) for a, b in zip(indexer.parameters(), trained.parameters()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"settings": replace(SETTINGS, lr=0.02)}, r"--lr was 0.01, is now 0.02"),
        (lambda: {"settings": replace(SETTINGS, steps=20)}, r"--steps was 9, is now 20"),
        (lambda: {"settings": replace(SETTINGS, seq_len=96)}, r"--seq-len was 64, is now 96"),
        (lambda: {"settings": replace(SETTINGS, seed=1)}, r"--seed was 0, is now 1"),
        (lambda: {"settings": replace(SETTINGS, target="paper")}, r"--target was far, is now paper"),
        (lambda: {"settings": replace(SETTINGS, queries_per_update=8)}, r"--queries-per-update was 16"),
        (lambda: {"stream": random_tokens(seed=1)}, r"data is another"),
        (lambda: {"model": attached(config=CONFIG.replace(index_heads=2))}, r"config.index_heads was 4, is now 2"),
        (lambda: {"model": attached(config=CONFIG.replace(local=5))}, r"config.local.0 was 4, is now 5"),
        (lambda: {"model": attached(config=CONFIG.replace(layers={0: {"dense": True}}))}, r"config.local.0 was 4"),
        (lambda: {"model": attached(num_hidden_layers=3)}, r"model.num_hidden_layers was 2, is now 3"),
        (lambda: {"model": attached("mistral")}, r"model.model_type was llama, is now mistral"),
        (lambda: {"model": attached().to(torch.bfloat16)}, r"model.dtype was float32, is now bfloat16"),
    ],
)
def test_another_run_is_not_resumed(whole: Path, change: Callable[[], dict[str, Any]], message: str) -> None:
    before = (whole / STATE).read_bytes()
    given = {"model": attached(), "stream": random_tokens(), "out": whole, "settings": SETTINGS, **change()}
    with pytest.raises(ValueError, match=f"resume: the run in .* was another one: .*{message}"):
        train_indexers(**given, options=RunOptions(resume=True))
    assert (whole / STATE).read_bytes() == before


def test_other_weights_of_the_same_model_are_noticed(whole: Path) -> None:
    model = attached()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"model\.sample is another"):
        train_indexers(model, random_tokens(), whole, SETTINGS, RunOptions(resume=True))


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no training run .state.safetensors is missing."):
        train_indexers(attached(), random_tokens(), tmp_path, SETTINGS, RunOptions(resume=True))


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_garbage(path: Path) -> None:
    path.write_bytes(b"\x80\x04 not safetensors")


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_truncated, damage_garbage, damage_empty])
def test_a_corrupt_state_is_named(whole: Path, damage: Callable[[Path], None]) -> None:
    damage(whole / STATE)
    with pytest.raises(ValueError, match=r"state.safetensors is truncated or corrupt .*indexers.safetensors"):
        train_indexers(attached(), random_tokens(), whole, SETTINGS, RunOptions(resume=True))


def test_a_state_of_another_format_is_named(whole: Path) -> None:
    save_file({"layers.0.weight.wq": torch.zeros(1)}, whole / STATE, metadata={"format": "other"})
    with pytest.raises(ValueError, match=r"is not a training state of this version of dsa .its format is 'other'"):
        train_indexers(attached(), random_tokens(), whole, SETTINGS, RunOptions(resume=True))


def test_a_full_disk_during_a_checkpoint_leaves_the_last_one(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        # Checkpoints sync the state's file first; the third one is that of step 8.
        if len(recorder.records) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    recorder = Recorder()
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        OSError, match=r"cannot write .*state.safetensors: the disk is full; what was there before"
    ) as e:
        train_indexers(attached(), random_tokens(), folder, SETTINGS, RunOptions(checkpoint_every=4, reporter=recorder))
    assert e.value.errno == errno.ENOSPC
    assert calls
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == [INDEXERS, "log.jsonl", STATE]
    resumed = Recorder()
    train_indexers(
        attached(), random_tokens(), folder, SETTINGS, RunOptions(checkpoint_every=4, resume=True, reporter=resumed)
    )
    assert resumed.begun == (4, 9, [0, 1])
    assert_same_run(folder, whole)
