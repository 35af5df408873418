"""The benchmarks by name, and running some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from dsa.bench import decode, end_to_end, llamacpp, memory, operations, prefill
from dsa.bench.result import Row
from dsa.bench.settings import Settings
from dsa.models.default_model import Status
from dsa.runs.progress import Progress

Bench = Callable[[Settings, Progress, Status], Iterator[Row]]

OPS: dict[str, Bench] = {
    "machine": decode.machine,
    "decode": decode.decode,
    "prefill": prefill.prefill,
    "memory": memory.memory,
    "index": operations.index,
    "crossover": prefill.crossover,
    "loss": operations.loss,
    "quantize": operations.quantize,
}

E2E: dict[str, Bench] = {
    "short": end_to_end.short,
    "prompt": end_to_end.prompt,
    "decode": end_to_end.decode,
    "llamacpp": llamacpp.llamacpp,
}


def chosen(benches: Mapping[str, Bench], only: Sequence[str] | None) -> list[Bench]:
    """The benchmarks of those names, in their own order; all without names.

    Raises:
        ValueError: There is none of a name.
    """
    unknown = [name for name in only or () if name not in benches]
    if unknown:
        raise ValueError(f"only: expected {', '.join(benches)}, got {unknown[0]!r}")
    return [bench for name, bench in benches.items() if not only or name in only]


def run(benches: Sequence[Bench], settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """Runs them one after the other; a row is handed on when it is complete and its checks have passed.

    Raises:
        Disagreement: A result differs from the reference's.
    """
    for bench in benches:
        rows = bench(settings, progress, status)
        while True:
            with torch.enable_grad() if bench is operations.loss else torch.no_grad():
                row = next(rows, None)
            if row is None:
                break
            yield row
