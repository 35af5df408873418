"""Causal prefill of one layer's attention: index, select and attend in blocks of queries, next to dense attention.

Shapes: `n` tokens, `H`/`G` query / KV heads, `D` head dim, `K` top-k.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa.bench import agreement
from dsa.bench.measure import Figure, Timing, in_turn, ratio
from dsa.bench.recording import Recording, recording
from dsa.bench.result import Row
from dsa.bench.settings import Settings
from dsa.bench.tensors import DEFAULT_MODEL_SIZES, LayerTensors, Sizes, gaussian
from dsa.models.default_model import Status
from dsa.models.layer import QUERIES_AT_A_TIME
from dsa.ops import dense_attention, index_topk, sparse_attention
from dsa.runs.progress import Progress

LENGTHS = (32768, 65536, 131072)
CROSSOVER_LENGTHS = (512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
CROSSOVER_SHARE = 3
"""Each of the many lengths has so much less time."""

QUICK_TOP_K = 32


@dataclass
class Phases:
    """Seconds spent in the two operations of one prefill."""

    index: list[float] = field(default_factory=list)
    attend: list[float] = field(default_factory=list)


def sparse_prefill(tensors: LayerTensors, sizes: Sizes, out: Tensor, phases: Phases | None = None) -> Tensor:
    """The attention of all queries `[1, n, H, D]`, as attached models make it: a block of queries at a time.

    It is written to `out`. Texts of at most `K` tokens run dense, which is the same, and need no `out`.
    """
    tokens = tensors.query.shape[1]
    if tokens <= sizes.top_k:
        return dense_attention(tensors.query, tensors.key, tensors.value)[0]
    index = attend = 0.0
    for begin in range(0, tokens, QUERIES_AT_A_TIME):
        stop = min(begin + QUERIES_AT_A_TIME, tokens)
        began = time.perf_counter()
        indices = index_topk(
            tensors.index_query[:, begin:stop],
            tensors.index_key[:, :stop],
            tensors.index_weight[:, begin:stop],
            sizes.top_k,
            sinks=sizes.sinks,
            local=sizes.local,
        )
        selected = time.perf_counter()
        block, _ = sparse_attention(tensors.query[:, begin:stop], tensors.key, tensors.value, indices)
        out[:, begin:stop] = block
        index += selected - began
        attend += time.perf_counter() - selected
        # A model's chunk ends here and frees them: kept, they would take memory together with the next block's.
        del indices, block
    if phases is not None:
        phases.index.append(index)
        phases.attend.append(attend)
    return out


def layer_tensors(data: str, tokens: int, settings: Settings, progress: Progress, status: Status) -> Recording:
    """One layer's tensors for a prefill: recorded from the model, or Gaussian with the default model's sizes."""
    if data == "recorded":
        top_k = QUICK_TOP_K if settings.quick else DEFAULT_MODEL_SIZES.top_k
        return recording(settings.model, tokens, top_k=top_k, status=status, progress=progress)
    quick = replace(DEFAULT_MODEL_SIZES, top_k=QUICK_TOP_K, local=8)
    sizes = quick if settings.quick else DEFAULT_MODEL_SIZES
    return Recording(gaussian(sizes, tokens), sizes, "standard normal numbers")


def prefill(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """A row per kind of data and length."""
    lengths = settings.lengths_or(LENGTHS, (96, 160))
    for data in settings.data:
        source = layer_tensors(data, max(lengths), settings, progress, status)
        for length in lengths:
            row = _prefill_at(data, source, length, progress, budget=settings.budget)
            row.figures.insert(0, ratio("SDPA / DSA", row.timings["SDPA"], row.timings["DSA"]))
            yield row


def crossover(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """A row per kind of data and length, and one that says from which length on the sparse path wins."""
    lengths = sorted(settings.lengths_or(CROSSOVER_LENGTHS, (16, 96)))
    for data in settings.data:
        source = layer_tensors(data, max(lengths), settings, progress, status)
        wins: dict[int, bool] = {}
        rows = []
        for length in lengths:
            row = _prefill_at(data, source, length, progress, budget=settings.budget / CROSSOVER_SHARE, own_dense=True)
            row.name = "crossover"
            short = length <= source.sizes.top_k
            own = row.timings["DSA"]
            row.figures = [
                ratio("SDPA / DSA", row.timings["SDPA"], own),
                ratio("own dense / DSA", row.timings["own dense"], own),
            ]
            if not short:
                wins[length] = all(figure.value >= 1 for figure in row.figures)
            rows.append(row)
            yield row
        yield _crossing(data, source.sizes, wins, rows)


def _crossing(data: str, sizes: Sizes, wins: dict[int, bool], rows: list[Row]) -> Row:
    row = Row("crossover", f"shortest n, {data}", {"data": data, **sizes.describe()})
    row.checks.append(f"the {len(rows)} rows before this one")
    winning: list[int] = []
    for length in sorted(wins, reverse=True):
        if not wins[length]:
            break
        winning.append(length)
    if winning:
        shortest = float(winning[-1])
        row.figures = [Figure("shortest n that wins", shortest, "tokens")]
        row.notes.append(f"Won there and at every longer one of: {', '.join(f'{each:,}' for each in wins)}.")
    else:
        row.notes.append("Dense attention is faster at the longest n measured.")
    return row


def _prefill_at(
    data: str, source: Recording, length: int, progress: Progress, *, budget: float, own_dense: bool = False
) -> Row:
    tensors, sizes = source.tensors.prefix(length), source.sizes
    query, key, value = (part.transpose(1, 2).contiguous() for part in (tensors.query, tensors.key, tensors.value))
    out = torch.zeros_like(tensors.query)
    outputs: dict[str, Tensor] = {}
    phases = Phases()

    def dsa() -> None:
        outputs["DSA"] = sparse_prefill(tensors, sizes, out, phases)

    def dense() -> None:
        outputs["own dense"] = dense_attention(tensors.query, tensors.key, tensors.value)[0]

    def sdpa() -> None:
        made = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        outputs["SDPA"] = made.transpose(1, 2)

    contenders = {"SDPA": sdpa, "DSA": dsa}
    if own_dense:
        contenders["own dense"] = dense
    # Before anything is timed, so that what runs once does not load the kernels in that time.
    rows = agreement.spread_rows(0, length)
    selection, said = agreement.check_selection(tensors, sizes, rows)
    with progress(f"prefill of {length:,}, {data}", 1) as advance:
        timings = in_turn(contenders, budget=budget)
        advance()
    checks = [said, agreement.check_sparse("DSA", outputs["DSA"], tensors, rows, selection)]
    checks += [agreement.check_dense(name, made, tensors, rows) for name, made in outputs.items() if name != "DSA"]
    if phases.index:
        runs = len(timings["DSA"].seconds)
        timings = {
            "DSA": timings["DSA"],
            "  index_topk": Timing(tuple(phases.index[-runs:])),
            "  sparse_attention": Timing(tuple(phases.attend[-runs:])),
            **timings,
        }
    row = Row("prefill", f"n = {length:,}, {data}", {"tokens": length, "data": data, **sizes.describe()}, timings)
    row.length, row.checks = length, checks
    row.notes.append(f"Tensors: {source.source}. Blocks of {QUERIES_AT_A_TIME:,} queries.")
    return row
