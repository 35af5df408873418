"""A word within a second, then at least every five: on an animated terminal, TERM=dumb, a pipe and a file."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from dsa.cli import waiting as module
from dsa.cli.waiting import Step, duration, roughly

# Stands for a command: what a step is, and that nothing else is printed.
PROGRAM = """
import time
from dsa.cli.waiting import Steps, waiting
with waiting.command("dsa test"):
    time.sleep(1)
    label = "Reading 90,000 tokens of a document with a name that is very long"
    with Steps(keep=False) as steps, steps(label, 90) as advance:
        for _ in range(9):
            time.sleep(1)
            advance(10)
"""
FIRST_S, SILENCE_S = 1.0, 5.0
START_S = 3.0
"""What an interpreter and rich may take to start on a busy machine, apart from the first word's second."""


@contextmanager
def output(kind: str, tmp_path: Path) -> Iterator[tuple[int, object, dict[str, str]]]:
    """Where stderr goes: what to read, what to hand to the process, and its TERM."""
    if kind in ("terminal", "dumb"):
        master, slave = pty.openpty()
        yield master, slave, {"TERM": "dumb" if kind == "dumb" else "xterm"}
        os.close(master)
    elif kind == "pipe":
        reading, writing = os.pipe()
        yield reading, writing, {}
        os.close(reading)
    else:
        file = (tmp_path / "stderr").open("wb")
        yield os.open(tmp_path / "stderr", os.O_RDONLY), file, {}
        file.close()


@pytest.mark.parametrize("kind", ["terminal", "dumb", "pipe", "file"])
def test_words_while_waiting(kind: str, tmp_path: Path) -> None:
    heard: list[tuple[float, bytes]] = []
    with output(kind, tmp_path) as (reading, writing, environment):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stderr=writing,  # type: ignore[call-overload]
            env={**os.environ, **environment, "COLUMNS": "80"},
        )
        began = time.monotonic()
        running = True
        while running:
            running = process.poll() is None
            if kind == "file" or select.select([reading], [], [], 0.1)[0]:
                time.sleep(0.05)
                try:
                    part = os.read(reading, 65536)
                except OSError:
                    break
                if part:
                    heard.append((time.monotonic() - began, part))
    assert process.wait() == 0
    times = [moment for moment, _ in heard]
    assert times[0] < FIRST_S + START_S
    assert max(after - before for before, after in pairwise(times)) < SILENCE_S
    text = b"".join(part for _, part in heard).decode()
    assert "loading libraries" in text
    assert "left" in text
    assert "%" in text
    if kind != "terminal":
        assert "\x1b" not in text
        assert len(text.splitlines()) >= 3


def test_figures_are_never_cut() -> None:
    step = Step("Reading 31,900 tokens of a document with a name that is very long indeed, and longer", 31900)
    step.done, step.began = 8000, step.began - 100
    line = step.line(60)
    assert len(line) <= 60
    assert line.endswith("…: 25 %, 1 min 40 s, about 4 min 59 s left")


def test_the_time_left_follows_the_growth() -> None:
    step = Step("Reading", 100, lambda parts: parts**2)
    step.done, step.began = 50, step.began - 10
    assert step.left_s() == pytest.approx(30, rel=0.01)


def test_nothing_is_said_while_others_draw(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_S", 0.0)
    with module.waiting.command("dsa test"), module.drawn_elsewhere():
        time.sleep(3 * module.TICK_S)
    assert capsys.readouterr().err == ""


def test_durations() -> None:
    assert [duration(each) for each in (8.4, 200, 1000, 7500)] == ["8 s", "3 min 20 s", "17 min", "2 h 5 min"]
    assert [roughly(each) for each in (38, 200, 4900, 7200)] == ["40 s", "3 min", "1 h 20 min", "2 h"]
