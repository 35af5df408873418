"""Several processes with one store: killed at any moment, reading the same text, removing what another has open."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa.generation.session import Session
from dsa.store import Store
from dsa.testing.stored import DOCUMENT, NEW, QUESTION, attached, only_entry, session

CHUNK = 16
MOMENTS = 30
PROMPT = [*DOCUMENT, *QUESTION]


@pytest.fixture(scope="module")
def llama() -> Any:
    return attached()


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Runs `work`, given a pipe to write to, in a process that has everything loaded; its id and the pipe to read."""
    heard, told = os.pipe()
    process = os.fork()
    if process == 0:
        code = 70
        try:
            os.close(heard)
            # The parent's threads are not in this process.
            torch.set_num_threads(1)
            work(told)
            code = 0
        finally:
            os._exit(code)
    os.close(told)
    return process, heard


def everything(heard: int) -> list[int]:
    """What a process told, a byte each."""
    with os.fdopen(heard, "rb") as pipe:
        return list(pipe.read())


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def answered(session: Session) -> list[int]:
    session.read(PROMPT, new_tokens=NEW, keep=len(DOCUMENT))
    written = list(session.write(NEW))
    session.keep_answer()
    return written


def test_killed_at_any_moment(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a killed process wrote is there without it, and a disk takes its time.
    monkeypatch.setattr(os, "fsync", lambda handle: None)

    def read(folder: Path) -> Callable[[int], None]:
        def work(told: int) -> None:
            reading = session(llama, folder, chunk=CHUNK)
            for _ in reading.chunks(PROMPT, keep=len(DOCUMENT)):
                os.write(told, bytes([len(reading.token_ids)]))
            list(reading.write(NEW))
            reading.keep_answer()

        return work

    expected = answered(Session(llama, chunk=CHUNK))
    began = time.perf_counter()
    process, heard = forked(read(tmp_path / "whole"))
    assert everything(heard)[-1] == len(PROMPT)
    assert ended(process) == 0
    whole = time.perf_counter() - began
    moments = random.Random(0)
    for number in range(MOMENTS):
        folder = tmp_path / str(number)
        process, heard = forked(read(folder))
        time.sleep(moments.uniform(0, whole))
        os.kill(process, signal.SIGKILL)
        ended(process)
        done = min(len(DOCUMENT), max(everything(heard), default=0))
        for entry in Store(folder).entries():
            assert Store(folder).verify(entry) == ""
        kept = session(llama, folder, chunk=CHUNK)
        assert answered(kept) == expected
        # At most the chunk that was being written is lost; fewer tokens than the least are not opened.
        assert kept.timings.opened >= (done - CHUNK if done - CHUNK >= 16 else 0)
        assert only_entry(folder).state.tokens == len(DOCUMENT)
        assert Store(folder).verify(only_entry(folder)) == ""


def test_two_processes_read_the_same_document(llama: Any, tmp_path: Path) -> None:
    expected = answered(Session(llama, chunk=CHUNK))

    def work(told: int) -> None:
        os.write(told, bytes(answered(session(llama, tmp_path, chunk=CHUNK))))

    processes = [forked(work) for _ in range(3)]
    assert [everything(heard) for _, heard in processes] == [expected] * 3
    assert [ended(process) for process, _ in processes] == [0] * 3
    assert only_entry(tmp_path).state.tokens == len(DOCUMENT)
    assert Store(tmp_path).verify(only_entry(tmp_path)) == ""


def test_one_removes_what_another_has_open(llama: Any, tmp_path: Path) -> None:
    expected = answered(session(llama, tmp_path))

    def work(told: int) -> None:
        reading = session(llama, tmp_path)
        assert reading.open(PROMPT) >= len(DOCUMENT)
        os.write(told, b"!")
        while list(Store(tmp_path).look()):
            time.sleep(0.01)
        os.write(told, bytes(answered(reading)))

    process, heard = forked(work)
    assert os.read(heard, 1) == b"!"
    assert Store(tmp_path).is_in_use(only_entry(tmp_path).name)
    Store(tmp_path).remove(only_entry(tmp_path))
    assert everything(heard) == expected
    assert ended(process) == 0
