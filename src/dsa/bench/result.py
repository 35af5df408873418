"""What a benchmark writes down: rows with their times, figures and environment, kept in one JSON file per run."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsa import ops
from dsa.bench.measure import Figure, Timing, quantiles
from dsa.ops import native_support
from dsa.runs.files import write_json
from dsa.runs.json_files import read_json
from dsa.runs.machine import describe_machine

FORMAT = "dsa bench 1"


@dataclass
class Row:
    """One thing that was measured.

    Args:
        name: As `--only` knows it.
        case: What tells rows of one name apart.
        shape: Sizes and dtypes.
        timings: Seconds of each contender and of each part, by name; parts begin with two spaces.
        figures: What follows from them.
        checks: What was compared before, in words, with the largest error.
        notes: What the reader must know to judge the figures.
        length: Tokens, where rows of other lengths make a curve.
    """

    name: str
    case: str
    shape: Mapping[str, Any]
    timings: dict[str, Timing] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    length: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, with where and when it was measured."""
        return {
            "name": self.name,
            "case": self.case,
            "length": self.length,
            "shape": dict(self.shape),
            "timings": {name: timing.to_json() for name, timing in self.timings.items()},
            "figures": [figure.to_json() for figure in self.figures],
            "checks": self.checks,
            "notes": self.notes,
            "environment": environment(),
        }


def environment() -> dict[str, Any]:
    """What every figure must carry."""
    return {
        **describe_machine(),
        "isa": None if native_support.missing() else native_support.isa(),
        "implementations": implementations(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    }


def implementations() -> dict[str, str]:
    """Which implementation `impl="auto"` takes for fp32 tensors on the CPU, by operation."""
    query, key = torch.ones(1, 1, 2, 8), torch.ones(1, 1, 1, 8)
    first = torch.zeros(1, 1, 1, dtype=torch.int32)
    weight = torch.ones(1, 1, 2)
    indexer = ops.IndexWeights(*(torch.ones(shape) for shape in ((16, 4), (8, 4), (2, 4), (8,), (8,))))
    hidden, place = torch.ones(1, 1, 4), torch.empty(1, 1, 8)
    calls = {
        "index_projection": lambda impl: ops.index_projection(hidden, indexer, None, place, impl=impl),
        "quantize_index_keys": lambda impl: ops.quantize_index_keys(key[:, :, 0], impl=impl),
        "index_topk": lambda impl: ops.index_topk(query, key[:, :, 0], weight, 1, impl=impl),
        "sparse_attention": lambda impl: ops.sparse_attention(query, key, key, first, impl=impl),
        "dense_attention": lambda impl: ops.dense_attention(query, key, key, impl=impl),
        "indexer_loss": lambda impl: ops.indexer_loss(query, key[:, :, 0], weight, query, key, impl=impl),
    }
    taken = {}
    for name, call in calls.items():
        try:
            call("native")
            taken[name] = "native"
        except NotImplementedError:
            taken[name] = "reference"
    return taken


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `write_rows` wrote.

    Raises:
        OSError: It cannot be read.
        ValueError: It is something else.
    """
    plain = read_json(path, dict[str, Any], str(path), "expected what `dsa bench --json` writes")
    if plain.get("format") != FORMAT or not isinstance(plain.get("rows"), list):
        raise ValueError(f"{path} holds no results of `dsa bench`; give the name of a new file")
    return [_without_samples(row) for row in plain["rows"]]


def _without_samples(row: dict[str, Any]) -> dict[str, Any]:
    """The row with quantiles where an earlier version kept every sample."""
    timings = {}
    for name, timing in row["timings"].items():
        samples = timing.get("seconds", ())
        kept = {key: value for key, value in timing.items() if key != "seconds"}
        timings[name] = {**quantiles(samples), **kept} if samples else kept
    return {**row, "timings": timings}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes all rows, replacing the file only when all of it is on disk."""
    write_json(path, {"format": FORMAT, "rows": list(rows)})


def merged(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with one added, or put in the place of the earlier one of the same name, case and setting."""
    if any(_key(row) == _key(new) for row in rows):
        return [new if _key(row) == _key(new) else row for row in rows]
    return [*rows, new]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["name"], row["case"], *setting(row))


def setting(row: Mapping[str, Any]) -> tuple[str | None, int]:
    """Instruction set and threads: what one file may hold several of."""
    return row["environment"]["isa"], row["environment"]["threads"]
