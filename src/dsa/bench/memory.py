"""What a prefill takes beyond its inputs and outputs: the growth of a fresh process's peak.

Run as `python -m dsa.bench.memory`, with the settings as JSON on the standard input.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from dsa.bench.measure import Figure
from dsa.bench.prefill import layer_tensors, sparse_prefill
from dsa.bench.result import Row
from dsa.bench.settings import Settings
from dsa.models.default_model import Status
from dsa.models.layer import QUERIES_AT_A_TIME
from dsa.runs.machine import peak_rss_mb, reset_peak_rss
from dsa.runs.progress import Progress, silent

MEMORY_LENGTH = 131072
WARM_UP_TOKENS = 64


def memory(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """What a prefill takes beyond its inputs and outputs, in a process of its own."""
    (length,) = settings.lengths_or((MEMORY_LENGTH,), (160,))[-1:]
    for data in settings.data:
        sizes = layer_tensors(data, length, settings, progress, status).sizes
        with progress(f"memory of a prefill of {length:,}, {data}", 1) as advance:
            used = extra_memory_mb(data, length, settings)
            advance()
        row = Row("memory", f"n = {length:,}, {data}", {"tokens": length, "data": data, **sizes.describe()})
        row.length = length
        row.figures = [Figure("peak beyond inputs and outputs", used, "MB")]
        block = QUERIES_AT_A_TIME * sizes.top_k * 4 / 1e6
        row.notes.append(f"The selection of one block of queries, int32, counts: {block:.0f} MB for a full block.")
        row.checks.append("the same prefill, in `--only prefill`")
        yield row


def extra_memory_mb(data: str, tokens: int, settings: Settings) -> float:
    """Megabytes (10^6) by which the peak of a process grows while it runs a prefill of so many tokens.

    Raises:
        OSError: The process failed, or the system cannot start a new peak (only Linux can).
    """
    asked = {
        "data": data,
        "tokens": tokens,
        "settings": {**asdict(settings), "lengths": None},
        "threads": torch.get_num_threads(),
    }
    finished = subprocess.run(
        [sys.executable, "-m", "dsa.bench.memory"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"the process that measures memory failed: {last}")
    return float(json.loads(finished.stdout.splitlines()[-1])["extra_mb"])


def main() -> None:
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    settings = Settings(**asked["settings"])
    source = layer_tensors(asked["data"], asked["tokens"], settings, silent, lambda message: None)
    tensors = source.tensors.prefix(asked["tokens"])
    out = torch.ones_like(tensors.query)
    # Threads, libraries and first-use tables are no part of a prefill.
    few = min(asked["tokens"], source.sizes.top_k + WARM_UP_TOKENS)
    sparse_prefill(tensors.prefix(few), source.sizes, out[:, :few])
    _return_freed_memory()
    if not reset_peak_rss():
        raise OSError("this system cannot measure the peak of a part of a process; only Linux can")
    before = _resident_mb()
    sparse_prefill(tensors, source.sizes, out)
    print(json.dumps({"extra_mb": peak_rss_mb() - before}))


def _return_freed_memory() -> None:
    """Memory that was freed, but not given back to the system, would hide what is taken next."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) * 1024 / 1e6


if __name__ == "__main__":
    main()
