"""How a run of the command ends: by itself, by a signal, on a closed pipe, at a file that cannot be written.

Exit codes: 0 done, or nobody reads on; 1 too little memory; 2 what the user can put right; 128 + N a signal.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Sequence
from itertools import pairwise
from types import FrameType
from typing import NoReturn

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")

_REMEDIES = {
    errno.ENOSPC: "free some space there, or name another place",
    errno.EDQUOT: "free some space there, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.EACCES: "name one that you may read and write",
    errno.EPERM: "name one that you may read and write",
}


def exit_code(error: BaseException) -> int | None:
    """2 for what the user can put right, 1 for too little memory, `None` for what is not ours to report."""
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY):
        return 1
    is_mistake = isinstance(error, (ValueError, OSError, ImportError, NotImplementedError))
    return 2 if is_mistake else None


def message(error: BaseException, arguments: Sequence[str] = (), options: Sequence[str] = ()) -> str:
    """What the user reads: files with the option that named them, options with their dashes, what helps.

    Args:
        error: What was raised.
        arguments: The words of the command line.
        options: What the command's options are called, with dashes.
    """
    if isinstance(error, OSError) and error.strerror and error.errno:
        where = "" if error.filename is None else f"{_named(str(error.filename), arguments)}: "
        remedy = _REMEDIES.get(error.errno)
        return f"{where}{error.strerror}" + (f"; {remedy}" if remedy else "")
    said = _in_a_shell(str(error) or type(error).__name__, options)
    first = re.match(r"[a-z_-]+(?= (?:must|is|are|cannot|has|have|takes)\b|:)", said)
    option = "" if first is None else f"--{first[0].replace('_', '-')}"
    if first is None or option not in options:
        return said
    rest = said[len(first[0]) :]
    return rest.removeprefix(": ") if rest.startswith(f": {option}") else option + rest


def _in_a_shell(said: str, options: Sequence[str]) -> str:
    """Names of arguments as the options that they are: `seq_len=64` as `--seq-len 64`; paths stay as they are."""
    for option in options:
        name = option.removeprefix("--").replace("-", "_")
        if "_" in name:
            place = rf"(?<![\w./(`-]){name}(?![\w/(]|\.\w)"
            said = re.sub(place, option, re.sub(f"{place}=", f"{option} ", said))
    return said


def _named(file: str, arguments: Sequence[str]) -> str:
    """The file, after the option whose value it is or lies in."""
    for option, value in pairwise(arguments):
        inside = file == value or file.startswith(os.path.join(value, ""))
        if option.startswith("-") and not value.startswith("-") and inside:
            return f"{option} {file}"
    return file


def open_streams() -> None:
    """Gives a process whose standard streams are closed the null device for them, so that no file takes their place.

    What is printed goes nowhere. `sys.stdin` stays `None`: reading from nothing is a mistake that is said.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            if number:
                setattr(sys, name, os.fdopen(number, "w"))


def catch_signals() -> None:
    """Lets SIGTERM end the process as Ctrl-C does, so that files and the terminal are left in order."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def stopped() -> int:
    """Says so after Ctrl-C; one more ends the process at once. Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("\nstopped", file=sys.stderr)
    return 128 + signal.SIGINT


def flush_or_drop() -> None:
    """Writes out what was printed; where that cannot be done, as into a closed pipe, it is dropped without a word."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
