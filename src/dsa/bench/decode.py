"""One decode step of attention: index, select, attend, compared with dense attention and with what the machine allows.

Shapes: `S` keys, `H`/`G` query / KV heads, `D` head dim, `Hi`/`Di` index heads / index head dim, `K` top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa.bench import agreement
from dsa.bench.measure import Figure, Timing, in_turn, ratio
from dsa.bench.probe import Limits, Prober, measure_limits
from dsa.bench.result import Row
from dsa.bench.settings import Settings
from dsa.bench.tensors import LARGE_SIZES, LayerTensors, Sizes, gaussian
from dsa.models.default_model import Status
from dsa.ops import dense_attention, index_topk, native_support, sparse_attention
from dsa.runs.progress import Progress

LENGTHS = (8192, 32768, 131072)
EVICTION_FLOATS = 1 << 26
"""256 MB are read between runs: in a model, other layers' caches pass before this one's turn comes again."""


def decode(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """A row per length of the cache."""
    sizes = replace(LARGE_SIZES, top_k=64) if settings.quick else LARGE_SIZES
    for length in settings.lengths_or(LENGTHS, (512,)):
        with progress(f"decode, {length:,} cached", 1) as advance:
            yield _decode_at(length, sizes, settings)
            advance()


def _decode_at(length: int, sizes: Sizes, settings: Settings) -> Row:
    prober = None if native_support.missing() else Prober(quick=settings.quick)
    limits: list[Limits] = []
    tensors = gaussian(sizes, length, queries=1)
    query, key, value = (part.transpose(1, 2).contiguous() for part in (tensors.query, tensors.key, tensors.value))
    indices = select(tensors, sizes.top_k)
    outputs: dict[str, Tensor] = {}

    def dsa() -> None:
        selected = select(tensors, sizes.top_k)
        outputs["DSA"] = sparse_attention(tensors.query, tensors.key, tensors.value, selected)[0]

    def dense() -> None:
        outputs["own dense"] = dense_attention(tensors.query, tensors.key, tensors.value)[0]

    def sdpa() -> None:
        outputs["SDPA"] = F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2)

    def probe() -> None:
        if prober is not None:
            limits.append(prober())

    contenders = {
        "": probe,
        "DSA": dsa,
        "  scan + select": lambda: select(tensors, sizes.top_k),
        "    scan, K = 1": lambda: select(tensors, 1),
        "  attend": lambda: sparse_attention(tensors.query, tensors.key, tensors.value, indices),
        "own dense": dense,
        "SDPA": sdpa,
    }
    for run in (dsa, dense, sdpa):
        run()
    rows = torch.zeros(1, dtype=torch.long)
    selection, said = agreement.check_selection(tensors, sizes, rows)
    checks = [
        said,
        agreement.check_sparse("DSA", outputs["DSA"], tensors, rows, selection),
        agreement.check_dense("own dense", outputs["own dense"], tensors, rows),
        agreement.check_dense("SDPA", outputs["SDPA"], tensors, rows),
    ]
    other_data = torch.zeros(1 << 16 if settings.quick else EVICTION_FLOATS)
    timings = in_turn(contenders, budget=settings.budget, before=other_data.sum)
    timings.pop("")
    row = Row("decode", f"n = {length:,}", {"keys": length, "queries": 1, **sizes.describe()}, timings, checks=checks)
    row.length = length
    row.notes.append("K, V and index keys lie where an attached model's cache puts them; SDPA reads plain copies.")
    row.figures = [
        ratio("SDPA / DSA", timings["SDPA"], timings["DSA"]),
        ratio("own dense / DSA", timings["own dense"], timings["DSA"]),
    ]
    if limits:
        row.figures += _against_limits(row, length, sizes, limits[-len(timings["DSA"].seconds) :])
    return row


def select(tensors: LayerTensors, top_k: int) -> Tensor:
    """What the indexer selects for all queries."""
    return index_topk(tensors.index_query, tensors.index_key, tensors.index_weight, top_k)


def floors(length: int, sizes: Sizes, limits: Limits) -> dict[str, float]:
    """Seconds that each phase takes at least.

    The scan reads one int8 key and its scale a token, the choice looks at each score once, and attention reads the
    selected tokens' keys and values.
    """
    selected = min(sizes.top_k, length)
    return {
        "scan": limits.floor(
            bytes_read=length * (sizes.index_dim + 4), int8=length * sizes.index_heads * sizes.index_dim
        ),
        "select": limits.floor(bytes_read=length * 4),
        "attend": limits.floor(
            bytes_read=selected * sizes.kv_heads * 2 * sizes.head_dim * 4,
            fp32=selected * sizes.heads * 2 * sizes.head_dim,
        ),
    }


def _against_limits(row: Row, length: int, sizes: Sizes, limits: list[Limits]) -> list[Figure]:
    """Judges each round by the limits that were measured in it."""
    phases = [floors(length, sizes, each) for each in limits]
    row.timings["floor"] = Timing(tuple(sum(each.values()) for each in phases))
    shown = ", ".join(f"{name} {1e3 * median(each[name] for each in phases):.3f} ms" for name in phases[0])
    row.notes.append(f"Floor, median of the rounds: {shown}.")
    read, fp32, int8 = (median(getattr(each, name) / 1e9 for each in limits) for name in ("read", "fp32", "int8"))
    row.notes.append(
        f"The machine, measured in each round: {read:.1f} GB/s read, {fp32:.0f} G fp32 and {int8:.0f} G int8 "
        "multiply-adds/s."
    )
    cache_bytes = length * sizes.kv_heads * 2 * sizes.head_dim * 4
    reading = Timing(tuple(cache_bytes / each.read for each in limits))
    share = ratio("own dense, of read bandwidth", reading, row.timings["own dense"])
    return [ratio("DSA / floor", row.timings["DSA"], row.timings["floor"]), share]


def machine(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """What the machine can do: the limits that the floors are made of."""
    with progress("Measuring the machine", 1) as advance:
        limits = measure_limits(quick=settings.quick)
        advance()
    row = Row("machine", "", {})
    if limits is None:
        row.notes.append("Not measured: the probes are part of the compiled kernels, which are not there.")
    else:
        row.figures = [
            Figure("memory, read", limits.read / 1e9, "GB/s"),
            Figure("fp32 multiply-adds", limits.fp32 / 1e9, "G/s"),
            Figure("int8 multiply-adds", limits.int8 / 1e9, "G/s"),
        ]
    yield row
