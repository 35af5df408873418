"""The ways a process ends, tried in every command: what the shell is told, and that no traceback is."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Ended = Callable[..., dict[str, Any]]

COMMANDS = {
    "info": ["info"],
    "demo": ["demo", "--model", "{tiny}", "--file", "{text}", "--tokens", "100", "--top-k", "32", "--local", "8"],
    "train": [
        "train",
        "{tiny}",
        "--data",
        "{text}",
        "--steps",
        "2",
        "--seq-len",
        "64",
        "--top-k",
        "16",
        "--local",
        "4",
        "--out",
        "{out}",
    ],
    "calibrate": ["calibrate", "{tiny}", "--data", "{text}", "--mass", "0.5", "--out", "{out}"],
    "generate": ["generate", "{tiny}", "--prompt", "hello", "--max-new-tokens", "8", "--json", "{out}.json"],
    "eval": [
        "eval",
        "{tiny}",
        "--file",
        "{text}",
        "--tokens",
        "100",
        "--top-k",
        "32",
        "--local",
        "8",
        "--json",
        "{out}.json",
    ],
    "explain": ["explain", "{tiny}", "--file", "{text}", "--top-k", "32", "--local", "8", "--out", "{out}.html"],
    "export": ["export", "{tiny}", "--out", "{out}"],
    "cost": ["cost", "--tokens", "100000", "--top-k", "1000", "--json", "{out}.json"],
    "bench": ["bench", "ops", "--quick", "--data", "gaussian", "--json", "{out}.json"],
}
WRITE = ("train", "generate", "eval", "explain", "cost", "bench")


@pytest.fixture(scope="module")
def ended() -> Iterator[Ended]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200"}
    environment.pop("DSA_DEBUG", None)
    command = [sys.executable, str(Path(__file__).with_name("ending_server.py"))]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(arguments: list[str], **more: Any) -> dict[str, Any]:
            server.stdin.write(json.dumps({"arguments": arguments, **more}) + "\n")
            server.stdin.flush()
            told = json.loads(server.stdout.readline())
            assert "Traceback" not in told["stderr"], told["stderr"]
            assert "Exception ignored" not in told["stderr"], told["stderr"]
            return told

        yield run
        server.stdin.close()


def words(command: str, tiny: str, text: str, out: Path) -> list[str]:
    return [word.format(tiny=tiny, text=text, out=out) for word in COMMANDS[command]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_signal(command: str, number: int, ended: Ended, tiny: str, text: str, tmp_path: Path) -> None:
    told = ended(words(command, tiny, text, tmp_path / "out"), signal=number, wait_s=0.3)
    # One that was done already, or that refused its arguments, ended by itself.
    assert told["code"] in (128 + number, 0, 2)
    if told["code"] == 128 + signal.SIGINT:
        assert "stopped" in told["stderr"]
    for file in tmp_path.rglob("*.json"):
        json.loads(file.read_text())


@pytest.mark.parametrize("command", list(COMMANDS))
def test_nobody_reads_the_output(command: str, ended: Ended, tiny: str, text: str, tmp_path: Path) -> None:
    told = ended(words(command, tiny, text, tmp_path / "out"), stdout="closed pipe")
    assert told["code"] in (0, 2)
    assert told["code"] == 0 or "error: " in told["stderr"]
    assert "pipe" not in told["stderr"].lower()


@pytest.mark.parametrize("command", list(COMMANDS))
def test_standard_input_is_closed(command: str, ended: Ended, tiny: str, text: str, tmp_path: Path) -> None:
    usual = ended(words(command, tiny, text, tmp_path / "usual"))["code"]
    assert ended(words(command, tiny, text, tmp_path / "out"), stdin="closed")["code"] == usual


def test_a_prompt_from_a_closed_standard_input(ended: Ended, tiny: str) -> None:
    told = ended(["generate", tiny], stdin="closed")
    assert told["code"] == 2
    assert "standard input is closed" in told["stderr"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", ["info", "cost", "generate"])
def test_standard_output_on_a_full_disk(command: str, ended: Ended, tiny: str, text: str, tmp_path: Path) -> None:
    told = ended(words(command, tiny, text, tmp_path / "out"), stdout="/dev/full")
    assert told["code"] == 2
    assert "No space left on device; free some space" in told["stderr"]


@pytest.mark.parametrize("command", WRITE)
def test_a_folder_that_cannot_be_written(command: str, ended: Ended, tiny: str, text: str) -> None:
    """/proc/self can be written by nobody, by root neither."""
    told = ended(words(command, tiny, text, Path("/proc/self/out")))
    assert told["code"] == 2
    assert "[Errno" not in told["stderr"]
    assert "/proc/self" in told["stderr"]
