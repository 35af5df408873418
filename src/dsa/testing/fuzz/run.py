"""The loop of the fuzzer: which operation a case tries, and what is said of one that fails."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from dsa.ops import native_support
from dsa.ops.types import Impl
from dsa.testing.fuzz import attention, indexing, loss, projection, quantizing
from dsa.testing.fuzz.draw import Draws

OPERATIONS: dict[str, Callable[[Draws], None]] = {
    "dense_attention": attention.fuzz_dense,
    "sparse_attention": attention.fuzz_sparse,
    "packed_attention": attention.fuzz_packed,
    "index_projection": projection.fuzz_index_projection,
    "indexer_loss": loss.fuzz_indexer_loss,
    "index_topk": indexing.fuzz_index_topk,
    "quantize": quantizing.fuzz_quantize,
}
"""By name, what draws one call of an operation and judges it."""


@dataclass
class Result:
    """What a run found.

    Args:
        counts: Cases by operation.
        failures: A report of each case that failed; its first line repeats the case.
        seconds: How long it took.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def fuzz(
    *,
    seed: int = 0,
    seconds: float | None = None,
    cases: int | None = None,
    operations: Sequence[str] | None = None,
    implementations: Sequence[Impl] = ("native", "reference"),
    keep_going: bool = False,
) -> Result:
    """Tries cases `seed`, `seed + 1`, ... of each operation in turn until time or cases are used up.

    Args:
        seed: Number of the first case.
        seconds: How long; `None` means until `cases` are done.
        cases: How many; `None` means until `seconds` are over.
        operations: Names among `OPERATIONS`; `None` means all.
        implementations: Which are tried.
        keep_going: Whether to go on after a difference.
    """
    result = Result()
    started = time.monotonic()
    names = sorted(operations or OPERATIONS)
    native = "native" in implementations and native_support.missing() is None
    usable = [name for name in implementations if name != "native" or native]
    with _settings_kept(native):
        while (seconds is None or time.monotonic() - started < seconds) and (
            cases is None or sum(result.counts.values()) < cases * len(names)
        ):
            for name in names:
                result.counts[name] += 1
                failure = try_case(name, seed, usable)
                if failure is None:
                    continue
                result.failures.append(failure)
                if not keep_going:
                    result.seconds = time.monotonic() - started
                    return result
            seed += 1
    result.seconds = time.monotonic() - started
    return result


def try_case(operation: str, seed: int, implementations: Sequence[Impl]) -> str | None:
    """Runs one case; returns `None`, or the command that repeats it, what was drawn and what was wrong."""
    draws = Draws(seed, small="triton" in implementations, implementations=implementations)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            OPERATIONS[operation](draws)
    except Exception as error:
        notes = " ".join(f"{name}={value}" for name, value in draws.notes.items())
        return (
            f"python -m dsa.testing.fuzz --operation {operation} --seed {seed} --cases 1 --impl "
            f"{' '.join(implementations)}\n  {type(error).__name__}: {error}\n  {notes}"
        )
    return None


@contextmanager
def _settings_kept(native: bool) -> Iterator[None]:
    """Threads and instruction set are afterwards what they were."""
    threads, isa = torch.get_num_threads(), native_support.isa() if native else None
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if isa is not None:
            native_support.set_isa(isa)
