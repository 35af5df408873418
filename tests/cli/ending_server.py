"""Runs the command in forks of a process that has loaded the libraries: streams, signals and exit codes are real.

Run as a script: it reads a run a line (JSON) and answers each with a line of JSON.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

import dsa.cli.console as console
import dsa.models.attachment  # noqa: F401
from dsa.__main__ import run


def _streams(asked: dict[str, Any], errors: int) -> None:
    if asked.get("stdin") == "closed":
        sys.stdin = None  # type: ignore[assignment]
        os.close(0)
    else:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    stdout = asked.get("stdout", os.devnull)
    if stdout == "closed pipe":
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
    else:
        os.dup2(os.open(stdout, os.O_WRONLY), 1)
    os.dup2(errors, 2)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, os.fdopen(os.dup(number), "w", buffering=1))
    console.out.file, console.err.file = sys.stdout, sys.stderr


def ended(asked: dict[str, Any]) -> dict[str, Any]:
    """`code` as a shell tells it, and what stood on stderr."""
    with tempfile.TemporaryFile() as errors:
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            _streams(asked, errors.fileno())
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # A signal is meant for the command, not for what stands before it here.
            os.write(told, b"!")
            sys.argv = ["dsa", *asked["arguments"]]
            try:
                run()
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 99
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            except OSError:
                code = 120
            os._exit(code)
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        if asked.get("signal"):
            began = time.monotonic()
            while os.fstat(errors.fileno()).st_size == 0 and time.monotonic() - began < asked.get("wait_s", 0.5):
                time.sleep(0.02)
            os.kill(child, asked["signal"])
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return {"code": 128 - code if code < 0 else code, "stderr": errors.read().decode(errors="replace")}


def main() -> None:
    torch.set_num_threads(1)
    told = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(ended(json.loads(line))), file=told, flush=True)


if __name__ == "__main__":
    assert Path(__file__).exists()
    main()
