#!/usr/bin/env python3
"""How good the estimates of the time to read are: before reading begins, and after a tenth of it.

python benchmarks/reading_time.py --lengths 4096,8192,16384 --json OUT

The default model reads the Python language reference. What is compared is what `dsa generate` says.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dsa.cli.waiting import Step
from dsa.generation.reading_time import expected_s, reading_work
from dsa.generation.session import Session
from dsa.models.loading import load_model
from dsa.models.sparse import attach_indexers
from dsa.runs.files import write_json
from dsa.runs.inputs import encode, read_document
from dsa.runs.machine import describe_machine


def measure(tokens: int) -> dict[str, Any]:
    """Reads so many tokens; seconds."""
    factor = -(-4 * (tokens + 512) // 8192) / 4
    scaling = {"rope_type": "yarn", "factor": factor} if factor > 1 else None
    loaded = load_model("default", rope_scaling=scaling)
    report, _ = attach_indexers(loaded, None)
    ids = encode(read_document(), loaded.tokenizer, tokens)[0].tolist()
    work = reading_work(loaded, report.config, tokens)
    assert work is not None
    before = expected_s(loaded, work(tokens))
    heard: list[float] = []

    @contextmanager
    def progress(label: str, total: int) -> Iterator[Any]:
        step = Step(label, total, work)

        def advance(parts: int = 1) -> None:
            step.done += parts
            left = step.left_s()
            if not heard and 10 * step.done >= total and left is not None:
                heard.append(step.seconds + left)

        yield advance

    began = time.perf_counter()
    Session(loaded.model).read(ids, progress=progress)
    taken = time.perf_counter() - began
    return {"tokens": tokens, "taken_s": taken, "before_s": before, "after_a_tenth_s": heard[0] if heard else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,8192,16384")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    rows = []
    for tokens in map(int, given.lengths.split(",")):
        row = measure(tokens)
        rows.append(row)
        said = {name: row[name] / row["taken_s"] for name in ("before_s", "after_a_tenth_s") if row[name] is not None}
        ratios = ", ".join(f"{name} {ratio:.2f} times that" for name, ratio in said.items())
        print(f"{tokens:,} tokens: {row['taken_s']:.1f} s; {ratios}", flush=True)
    if given.json is not None:
        write_json(given.json, {"rows": rows, "environment": describe_machine()})


if __name__ == "__main__":
    main()
