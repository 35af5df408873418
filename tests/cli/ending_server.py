"""Runs the command in forks of a process that has loaded the libraries: streams, signals and exit codes are real.

Run as a script: it reads a run a line (JSON) and answers each with a line of JSON.
"""

import ctypes
import importlib
import json
import os
import pkgutil
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM, LlamaForCausalLM  # noqa: F401
from typer.testing import CliRunner

import dsa
import dsa.cli.console as console
from dsa.__main__ import run
from dsa.cli.main import app

NOT_LOADED = ("__main__", "dsa.testing", "triton", "vendor", "llamacpp")
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
PRIVATE = 0x4000 | 0x40000
FULL = "filler"


def load_everything() -> None:
    """What commands import when they run, so that a fork has it at once."""
    for module in pkgutil.walk_packages(dsa.__path__, "dsa."):
        if not any(name in module.name for name in NOT_LOADED):
            importlib.import_module(module.name)
    CliRunner().invoke(app, ["bench", "show", os.devnull])


def _streams(asked: dict[str, Any], errors: int) -> None:
    os.dup2(errors, 2)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    if asked.get("stdin") == "closed":
        sys.stdin = None  # type: ignore[assignment]
        os.close(0)
    else:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    stdout = asked.get("stdout", os.devnull)
    if stdout == "closed":
        sys.stdout = None  # type: ignore[assignment]
        os.close(1)
    else:
        if stdout == "closed pipe":
            read, write = os.pipe()
            os.close(read)
            os.dup2(write, 1)
        else:
            os.dup2(os.open(stdout, os.O_WRONLY), 1)
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    console.out.file, console.err.file = sys.stdout, sys.stderr


def _signal_at(number: int, moment: str) -> None:
    """Sends a signal to this process as it opens its first file, or as something that was written goes to the disk."""
    left = [number]

    def send(*_: object) -> None:
        if left:
            os.kill(os.getpid(), left.pop())

    if moment == "beginning":
        sys.addaudithook(lambda event, _: send() if event == "open" else None)
        return
    real = os.fsync

    def fsync(handle: int) -> None:
        send()
        real(handle)

    os.fsync = fsync


def _full_disk(folder: str) -> str | None:
    """Mounts a disk without room there, which this process alone sees; returns what stands in the way."""
    library = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    wanted = NEW_MOUNTS if user == 0 else NEW_MOUNTS | NEW_USER
    if library.unshare(wanted):
        return f"unshare: {os.strerror(ctypes.get_errno())}"
    if wanted & NEW_USER:
        for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(content)
    if library.mount(None, b"/", None, PRIVATE, None) or library.mount(
        b"none", folder.encode(), b"tmpfs", 0, b"size=16k"
    ):
        return f"mount: {os.strerror(ctypes.get_errno())}"
    with (Path(folder) / FULL).open("wb", buffering=0) as filler:
        while True:
            try:
                filler.write(bytes(4096))
            except OSError:
                return None


def _run(asked: dict[str, Any], told: int) -> int:
    """The command in this process, a fork; writes what can be seen from inside only."""
    seen: dict[str, Any] = {"loaded": False}
    os.environ.update(asked.get("environment", {}))
    if asked.get("full"):
        seen["missing"] = _full_disk(asked["full"])
        if seen["missing"]:
            os.write(told, json.dumps(seen).encode())
            return 0

    def look(event: str, arguments: Any) -> None:
        if event == "open" and str(arguments[0]).endswith("tokenizer_config.json"):
            seen["loaded"] = True

    sys.addaudithook(look)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked.get("signal"):
        _signal_at(asked["signal"], asked["at"])
    sys.argv = ["dsa", *asked["arguments"]]
    try:
        run()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 99
    # As the interpreter does: the thread that keeps what was read comes to its end.
    threading._shutdown()  # type: ignore[attr-defined]
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:
        code = 120
    if asked.get("full"):
        seen["left"] = [str(each) for each in Path(asked["full"]).rglob("*") if each.is_file() and each.name != FULL]
    os.write(told, json.dumps(seen).encode())
    return code


def ended(asked: dict[str, Any]) -> dict[str, Any]:
    """`code` as a shell tells it, what stood on stderr, and what `_run` saw, where the process came to its end."""
    with tempfile.TemporaryFile() as errors:
        read, told = os.pipe()
        child = os.fork()
        if child == 0:
            code = 98
            try:
                _streams(asked, errors.fileno())
                code = _run(asked, told)
            finally:
                os._exit(code)
        os.close(told)
        _, status = os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            seen = json.loads(pipe.read() or "{}")
        errors.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return {"code": 128 - code if code < 0 else code, "stderr": errors.read().decode(errors="replace"), **seen}


def main() -> None:
    torch.set_num_threads(1)
    load_everything()
    told = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(ended(json.loads(line))), file=told, flush=True)


if __name__ == "__main__":
    main()
