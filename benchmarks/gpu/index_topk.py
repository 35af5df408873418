"""`index_topk` on one GPU.

Every form is checked at the sizes that are timed: int8 against the reference, bit for bit; the others against the exact
top-k of the scores that the kernel itself stores, and those scores against fp64. Then the fused operation is timed
next to the unfused path (the same kernel storing all scores, then `torch.topk`), decoding from a CUDA graph, a whole
causal prefill, paged keys, and every candidate tile.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `K` top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.common import (
    DEVICE,
    MEMORY,
    Row,
    extra_memory,
    milliseconds,
    normal,
    replayed,
    with_floor,
    with_vendor,
)
from dsa.ops import PagedKeys, QuantizedKeys, hadamard_transform, index_topk, quantize_index_keys, triton_support
from dsa.ops.index_topk import reference, vendor
from dsa.ops.index_topk import triton as kernels
from dsa.ops.index_topk import triton_rounds as rounds
from dsa.ops.index_topk.selection import select_highest
from dsa.ops.paging.types import BLOCK
from dsa.ops.ranges import resolve_ranges

DEFAULT = rounds.Limits()
ONE_ROUND = replace(DEFAULT, one_round=1 << 62)
SINKS, LOCAL = 4, 32
Inputs = tuple[Tensor, Tensor | QuantizedKeys | PagedKeys, Tensor]


def make(batch: int, tokens: int, keys: int, heads: int, dim: int, form: str, seed: int = 0) -> Inputs:
    """Fresh random inputs; the heads of a query share a direction, as a trained indexer's do."""
    k = normal(batch, keys, dim, seed=3 * seed)
    q = normal(batch, tokens, heads, dim, seed=3 * seed + 1) + 0.5 * k[:, -tokens:].unsqueeze(2)
    w = normal(batch, tokens, heads, seed=3 * seed + 2)
    return q, k if form == "bf16" else quantize_index_keys(k, form), w


def options(q: Tensor, k: Tensor | QuantizedKeys) -> dict[str, Any]:
    ranges = resolve_ranges("index_topk", None, None, q.shape[0], q.shape[1], k.shape[1], q.device)
    return {"scale": q.shape[-1] ** -0.5, "sinks": SINKS, "local": LOCAL, "ranges": ranges}


def fused(inputs: Inputs, top_k: int, limits: rounds.Limits = DEFAULT) -> Tensor:
    q, k, w = inputs
    return kernels.select(q, k, w, top_k, limits=limits, **options(q, k))


class StoredScores:
    """The unfused path's first half: all ordered keys of a chunk of queries, int32 `[B * T, extent]`.

    Distances count back from the newest key of the row's block of queries. The kernel stores integers in the order of
    the scores where a plain kernel would store the scores: as many bytes, and `torch.topk` is as fast on them.
    """

    def __init__(self, inputs: Inputs, config: triton_support.Config | None = None) -> None:
        q, k, w = inputs
        self.settings = options(q, k)
        operands = kernels._operands(q, k, w, self.settings["scale"])
        every = slice(None), slice(None)
        chunk_options = (self.settings["sinks"], self.settings["local"], self.settings["ranges"], every, ONE_ROUND)
        self.chunk = rounds.Chunk(operands, 1, *chunk_options)
        configs = rounds.score_configs(operands, q.shape[1])
        self.extent = max(rounds.round_up(self.chunk._extent(tile["BLOCK_M"])) for tile in configs)
        self.chunk._capacity = self.extent // 2
        self.chunk._candidates = torch.empty(1, dtype=torch.int64, device=DEVICE)
        # Hidden tokens that no block of queries comes to keep the lowest number.
        sizes = q.shape[0] * q.shape[1], self.extent
        self.chunk._dense = torch.full(sizes, -(2**31), dtype=torch.int32, device=DEVICE)
        self.config = config or self.chunk._choose(configs, min(self.extent, DEFAULT.first_round))
        self.chunk._dense.fill_(-(2**31))

    def store(self) -> Tensor:
        self.chunk._score(self.config, 0, self.extent)
        return self.chunk._dense

    def newest(self) -> Tensor:
        """One past the newest key that the block of each row sees, int64 `[B * T]`."""
        tokens, rows = self.chunk._tokens, self.config["BLOCK_M"]
        last = torch.nn.functional.pad(self.chunk._host_last, (0, -tokens % rows)).unflatten(1, (-1, rows)).amax(-1)
        return last.repeat_interleave(rows, 1)[:, :tokens].reshape(-1).to(DEVICE)

    def selection(self, top_k: int) -> Tensor:
        """The exact top-k of the stored scores by torch alone, int64 `[B * T, K]`."""
        oldest_first = self.store().flip(-1)
        return select_highest(oldest_first, top_k) + (self.newest() - self.extent).unsqueeze(1)


def check(inputs: Inputs, top_k: int, form: str, limits: rounds.Limits) -> Row:
    """Raises if a selection is wrong, and gives the error of the scores against fp64."""
    q, k, w = inputs
    torch.manual_seed(0)
    selection = fused(inputs, top_k, limits)
    few = torch.randperm(q.shape[1])[:64].sort().values.to(DEVICE)
    stored = StoredScores(inputs)
    if form == "int8":
        settings = options(q, k)
        settings["ranges"] = settings["ranges"].select(few.cpu())
        expected = reference.index_topk(q[:, few], k, w[:, few], top_k, **settings)
        assert torch.equal(selection[:, few], expected), "int8 must select what the reference selects"
    assert torch.equal(selection.flatten(0, 1).long(), stored.selection(top_k)), f"{form}: not the exact top-k"
    rows = [(b, t) for b in range(q.shape[0]) for t in few[:16].tolist()]
    worst = max(score_error(stored, inputs, b, t) for b, t in rows)
    assert worst < {"int8": 0.05, "fp8": 0.1, "bf16": 0.01}[form], f"{form}: scores err by {worst}"
    return {"what": "check", "form": form, "shape": shape_of(inputs), "score error": worst}


def score_error(stored: StoredScores, inputs: Inputs, b: int, t: int) -> float:
    """Relative error of one row's stored scores, in the norm, against fp64 from unquantised queries."""
    q, k, w = inputs
    keys = k.dequantize()[b] if isinstance(k, QuantizedKeys) else k[b]
    query = hadamard_transform(q[b, t].double()) if isinstance(k, QuantizedKeys) else q[b, t].double()
    exact = stored.settings["scale"] * (query @ keys.double().T).relu().T @ w[b, t].double()
    row = b * q.shape[1] + t
    newest = int(stored.newest()[row])
    ordered = stored.chunk._dense[row]
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    # Between the sinks and the local tokens, which have no score.
    first, last = stored.settings["sinks"], int(stored.settings["ranges"].end[b, t]) - stored.settings["local"]
    positions = torch.arange(first, last, device=DEVICE)
    difference = scores[newest - 1 - positions].double() - exact[first:last]
    return (difference.norm() / exact[first:last].norm()).item()


def shape_of(inputs: Inputs) -> str:
    q, k, _ = inputs
    return f"B {q.shape[0]} T {q.shape[1]} S {k.shape[1]} Hi {q.shape[2]} Di {q.shape[3]}"


def prefill(inputs: Inputs, top_k: int, form: str, asked: tuple[tuple[str, str, float], ...]) -> Row:
    """The fused operation compared with the unfused path, on one chunk of queries at the end of the keys."""
    q, k, _ = inputs
    visible = int(options(q, k)["ranges"].host_end.sum()) * q.shape[0]
    stored = StoredScores(inputs)
    scores = stored.store()
    times = {
        "fused": milliseconds(lambda: fused(inputs, top_k)),
        "logits": milliseconds(stored.store),
        "topk": milliseconds(lambda: scores.topk(top_k, dim=-1, sorted=False)),
    }
    operations = 2 * visible * q.shape[2] * q.shape[3]
    row = {
        "what": "index prefill",
        "form": form,
        "shape": shape_of(inputs),
        "ms": times["fused"],
        "unfused ms": times["logits"] + times["topk"],
        "ratio": (times["logits"] + times["topk"]) / times["fused"],
        "logits TFLOP/s": operations / times["logits"] / 1e9,
        "fused TFLOP/s": operations / times["fused"] / 1e9,
        "extra MB": extra_memory(lambda: fused(inputs, top_k)),
        "parts": times,
        "asked": asked,
    }
    gap = vendor.gap(q, k)
    row = with_vendor(row, gap, lambda: index_topk(*inputs, top_k, sinks=SINKS, local=LOCAL, impl="vendor"))
    return with_floor(row, q.nbytes, operations, "bf16" if form == "bf16" else "fp8")


def decode(sets: list[Inputs], top_k: int, form: str) -> Row:
    """One query: launched from Python, and replayed from a graph over several sets of keys, larger than the L2."""

    def launch(inputs: Inputs) -> Tensor:
        return index_topk(*inputs, top_k, sinks=SINKS, local=LOCAL, impl="triton")

    took = replayed([lambda inputs=inputs: launch(inputs) for inputs in sets])
    key_bytes = sets[0][1].shape.numel() * (2 if form == "bf16" else 1)
    row = {
        "what": "index decode", "form": form, "shape": shape_of(sets[0]), "ms": took,
        "launched ms": milliseconds(lambda: launch(sets[0])), "GB/s of keys": key_bytes / took / 1e6,
    }  # fmt: skip
    return with_floor(row, key_bytes, 0)


def tiles(inputs: Inputs, form: str) -> Iterator[Row]:
    """Every candidate tile of the score kernel."""
    q, k, w = inputs
    for config in rounds.score_configs(kernels._operands(q, k, w, 1.0), q.shape[1]):
        stored = StoredScores(inputs, config)
        took = milliseconds(stored.store)
        operations = 2 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2] * q.shape[3]
        yield {
            "what": "tile", "form": form, "shape": shape_of(inputs), "ms": took,
            "logits TFLOP/s": operations / took / 1e9, "config": config,
        }  # fmt: skip


def in_pages(keys: QuantizedKeys) -> PagedKeys:
    """The same keys in pages that lie in another order."""
    batch, tokens, dim = keys.shape
    count = -(-tokens // BLOCK)
    order = torch.randperm(batch * count, device=DEVICE).int().view(batch, count)
    pages = torch.zeros(batch * count, BLOCK, dim + 4, dtype=torch.uint8, device=DEVICE)
    paged = PagedKeys(pages, order, tokens, keys.dtype)
    paged.write(keys)
    return paged


def check_pages(inputs: Inputs, top_k: int, form: str) -> Row:
    """Raises unless keys in pages give the selection of the same keys in one piece."""
    q, k, w = inputs
    assert isinstance(k, QuantizedKeys)
    paged = index_topk(q, in_pages(k), w, top_k, sinks=SINKS, local=LOCAL, impl="triton")
    assert torch.equal(paged, index_topk(q, k, w, top_k, sinks=SINKS, local=LOCAL, impl="triton")), "pages change it"
    return {"what": "check pages", "form": form, "shape": shape_of(inputs)}


def rows(small: bool) -> Iterator[Row]:
    """Everything, checks first."""
    tokens, lengths, top_k = (3, (600,), 40) if small else (2048, (65536, 131072), 2048)
    heads, dim = (2, 32) if small else (64, 128)
    limits = replace(DEFAULT, first_round=256, one_round=1) if small else DEFAULT
    for form in ("fp8", "int8", "bf16"):
        yield check(make(1, tokens, lengths[0], heads, dim, form, seed=1), top_k, form, limits)
    yield check(make(3, 1, lengths[0], heads, dim, "int8", seed=2), top_k, "int8", limits)
    for form in ("fp8", "int8"):
        yield check_pages(make(2, min(tokens, 64), lengths[0], heads, dim, form, seed=4), top_k, form)
    for length in lengths:
        for form in ("fp8", "int8", "bf16"):
            asked = (("ratio", ">=", 1.4), ("logits TFLOP/s", ">=", 700), MEMORY) if form == "fp8" else (MEMORY,)
            yield prefill(make(1, tokens, length, heads, dim, form), top_k, form, asked)
    for form in ("fp8", "int8"):
        yield from tiles(make(1, tokens, min(16384, lengths[0]), heads, dim, form), form)
    for batch in (1,) if small else (1, 32):
        for size in ((heads, dim),) if small else ((8, 64), (64, 128)):
            number = 2 if small else 6 // batch + 1
            sets = [make(batch, 1, lengths[-1], *size, "int8", seed) for seed in range(number)]
            yield decode(sets, top_k, "int8")
            paged = [(q, in_pages(k), w) for q, k, w in sets if isinstance(k, QuantizedKeys)]
            del sets
            yield decode(paged, top_k, "paged")
            del paged
    length = 60 if small else 131072
    inputs = make(1, length, length, *((2, 32) if small else (8, 64)), "int8")
    took = milliseconds(lambda: fused(inputs, top_k), 3)
    operations = length * length * inputs[0].shape[2] * inputs[0].shape[3]
    row = {
        "what": "index whole prefill", "form": "int8", "shape": shape_of(inputs), "ms": took,
        "fused TFLOP/s": operations / took / 1e9, "extra MB": extra_memory(lambda: fused(inputs, top_k)),
        "asked": (MEMORY,),
    }  # fmt: skip
    # int8 products run at the rate of fp8's.
    yield with_floor(row, 0, operations, "fp8")
