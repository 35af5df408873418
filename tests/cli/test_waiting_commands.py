"""Every command speaks while its slow work goes on: on an animated terminal, with TERM=dumb, into a pipe and a file.

The slow work of each command is replaced by a stand-in that goes on until it has been heard of, twice. How long a word
takes is the matter of `test_waiting.py`; here nothing depends on the speed of the machine.
"""

from __future__ import annotations

import os
import pty
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from click.exceptions import Exit

from dsa.cli import console
from dsa.cli import waiting as module
from dsa.cli.main import COMMANDS, app

LOADING = "dsa.models.loading.load_model"
WORK: dict[str, tuple[tuple[str, ...], str]] = {
    "demo": (("demo",), LOADING),
    "info": (("info",), "dsa.cli.info.implementations"),
    "models": (("models",), "dsa.models.on_disk.models_on_disk"),
    "train": (("train", "default", "--data", "{text}", "--steps", "1", "--out", "{new}"), LOADING),
    "calibrate": (("calibrate", "default", "--data", "{text}", "--mass", "0.9", "--out", "{new}"), LOADING),
    "read": (("read", "default", "--file", "{text}", "--store", "{new}"), LOADING),
    "generate": (("generate", "default", "--file", "{text}", "--no-store"), LOADING),
    "serve": (("serve", "default", "--store", "{new}", "--port", "0"), LOADING),
    "eval": (("eval", "default", "--file", "{text}"), LOADING),
    "explain": (("explain", "default", "--file", "{text}", "--out", "{new}"), LOADING),
    "export": (("export", "default", "--out", "{new}"), LOADING),
    "check": (("check", "default"), "dsa.models.loading.read_config"),
    "cost": (("cost", "--tokens", "1000", "--model", "Qwen3-8B"), "dsa.cost.read_model"),
    "store": (("store", "verify", "--store", "{new}"), "dsa.store.Store.look"),
    "bench": (("bench", "ops"), "dsa.bench.suites.run"),
}
KINDS = ("terminal", "dumb", "pipe", "file")


class Heard:
    """What came through a terminal, a pipe or a file, word by word."""

    def __init__(self, kind: str, folder: Path) -> None:
        if kind in ("terminal", "dumb"):
            self._reading, self.writing = pty.openpty()
        elif kind == "pipe":
            self._reading, self.writing = os.pipe()
        else:
            self.writing = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT)
            self._reading = os.open(folder / "stderr", os.O_RDONLY)
        self.parts: list[bytes] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._ended.is_set():
            try:
                part = os.read(self._reading, 65536)
            except OSError:
                return
            if part:
                self.parts.append(part)
            else:
                time.sleep(0.01)

    @property
    def text(self) -> str:
        return b"".join(self.parts).decode()

    def close(self) -> None:
        os.close(self.writing)
        self._ended.set()
        self._thread.join(timeout=1)
        os.close(self._reading)


@pytest.fixture(params=KINDS)
def heard(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    """Stderr of the commands of this process."""
    made = Heard(request.param, tmp_path)
    monkeypatch.setenv("TERM", "dumb" if request.param == "dumb" else "xterm")
    for name, seconds in (("FIRST_S", 0.02), ("SILENCE_S", 0.05), ("TICK_S", 0.01)):
        monkeypatch.setattr(module, name, seconds)
    with open(made.writing, "w", closefd=False, buffering=1) as stream:
        for each in (console.err, module._drawn_on):
            monkeypatch.setattr(each, "_file", stream)
            # Found out when the console is made.
            monkeypatch.setattr(each, "is_interactive", request.param == "terminal")
        yield made
    made.close()


class Enough(Exception):
    """The stand-in was heard of."""


def test_every_command_waits_aloud() -> None:
    """`add_command` lets a command run within `waiting.command`: what the user calls goes through it."""

    def leaves(command: Any) -> Iterator[Any]:
        for each in getattr(command, "commands", {}).values():
            yield from leaves(each) if hasattr(each, "commands") else [each]

    found = list(leaves(typer.main.get_command(app)))
    assert len(found) >= len(COMMANDS)
    for each in found:
        inner = each.callback.__wrapped__
        assert Path(inner.__code__.co_filename).name == "commands.py", each.name


def test_a_word_while_slow_work_goes_on(
    heard: Heard, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSA_STORE", str(tmp_path / "store"))

    def work(*_: object, **__: object) -> None:
        before, until = len(heard.parts), time.monotonic() + 20
        while len(heard.parts) < before + 2:
            assert time.monotonic() < until, "nothing was heard"
            time.sleep(0.005)
        raise Enough

    for command, (arguments, slow) in WORK.items():
        new = tmp_path / f"{command}-new"
        with monkeypatch.context() as patched:
            patched.setattr(slow, work)
            with pytest.raises((Enough, Exit)) as ended:
                app([each.format(text=text, new=new) for each in arguments], standalone_mode=False)
        assert ended.type is Enough, f"{command}: {heard.text[-500:]}"
