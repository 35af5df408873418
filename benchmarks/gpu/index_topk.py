"""Index scores, exact selection and the append to the index cache on one GPU.

    python benchmarks/gpu/index_topk.py [--out FILE.json] [--small]

First every form is checked at the sizes that are timed: int8 against the reference, bit for bit; the others against
the exact top-k of the scores that the kernel itself stores, and those scores against fp64. Then it times the fused
operation beside the unfused path (the same kernel storing all scores, then `torch.topk`), decoding from a CUDA graph,
a whole causal prefill, the append, and every candidate tile. `--small` runs all of it at sizes for a first try; on a
machine without a GPU it needs TRITON_INTERPRET=1 and measures nothing worth reading.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `K` top-k.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from dsa.ops import QuantizedKeys, hadamard_transform, quantize_index_keys, triton_support
from dsa.ops.index_topk import reference
from dsa.ops.index_topk import triton as kernels
from dsa.ops.ranges import resolve_ranges

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEFAULT = kernels.Limits()
ONE_ROUND = replace(DEFAULT, one_round=1 << 62)
Row = dict[str, Any]
Inputs = tuple[Tensor, Tensor | QuantizedKeys, Tensor]


def milliseconds(launch: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a launch."""
    if DEVICE.type == "cuda":
        return triton_support.milliseconds(launch, repeats)
    begin = time.perf_counter()
    launch()
    return 1e3 * (time.perf_counter() - begin)


def make(batch: int, tokens: int, keys: int, heads: int, dim: int, form: str, seed: int = 0) -> Inputs:
    """Fresh random inputs; all heads share a direction with some keys, as a trained indexer's do."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    k = normal(batch, keys, dim)
    q = normal(batch, tokens, heads, dim) + 0.5 * normal(batch, tokens, 1, dim)
    w = normal(batch, tokens, heads)
    return q, k if form == "bf16" else quantize_index_keys(k, form), w


def options(q: Tensor, k: Tensor | QuantizedKeys) -> dict[str, Any]:
    ranges = resolve_ranges("index_topk", None, None, q.shape[0], q.shape[1], k.shape[1], q.device)
    return {"scale": q.shape[-1] ** -0.5, "sinks": 4, "local": 64, "ranges": ranges}


def fused(inputs: Inputs, top_k: int, limits: kernels.Limits = DEFAULT) -> Tensor:
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
        self.chunk = kernels._Chunk(operands, 1, *chunk_options)
        configs = kernels._score_configs(operands, q.shape[1])
        self.extent = max(kernels._round_up(self.chunk._extent(tile["BLOCK_M"])) for tile in configs)
        self.chunk._capacity = self.extent // 2
        self.chunk._candidates = torch.empty(0)
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
        return reference.select_highest(oldest_first, top_k) + (self.newest() - self.extent).unsqueeze(1)


def check(inputs: Inputs, top_k: int, form: str, limits: kernels.Limits) -> Row:
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


def extra_memory(launch: Callable[[], Tensor]) -> int:
    """Peak bytes beyond what was allocated before and what is returned."""
    if DEVICE.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = launch()
    return torch.cuda.max_memory_allocated() - before - result.numel() * result.element_size()


def prefill(inputs: Inputs, top_k: int, form: str) -> Row:
    """The fused operation beside the unfused path, on one chunk of queries at the end of the keys."""
    q, k, _ = inputs
    visible = int(options(q, k)["ranges"].host_end.sum()) * q.shape[0]
    stored = StoredScores(inputs)
    scores = stored.store()
    times = {
        "fused": milliseconds(lambda: fused(inputs, top_k)),
        "logits": milliseconds(stored.store),
        "topk": milliseconds(lambda: scores.topk(top_k, dim=-1, sorted=False)),
    }
    memory = extra_memory(lambda: fused(inputs, top_k))
    operations = 2 * visible * q.shape[2] * q.shape[3]
    return {
        "what": "prefill",
        "form": form,
        "shape": shape_of(inputs),
        "ms": times["fused"],
        "unfused ms": times["logits"] + times["topk"],
        "ratio": (times["logits"] + times["topk"]) / times["fused"],
        "logits TFLOP/s": operations / times["logits"] / 1e9,
        "fused TFLOP/s": operations / times["fused"] / 1e9,
        "extra MB": memory / 1e6,
        "parts": times,
    }


def decode(sets: list[Inputs], top_k: int, form: str) -> Row:
    """One query: launched from Python, and replayed from a graph over several sets of keys, larger than the L2."""
    prepared = [(inputs, options(*inputs[:2])) for inputs in sets]
    for (q, k, w), settings in prepared:
        kernels.select(q, k, w, top_k, **settings)
    row = {"what": "decode", "form": form, "shape": shape_of(sets[0])}
    (q, k, w), settings = prepared[0]
    row["launched ms"] = milliseconds(lambda: kernels.select(q, k, w, top_k, **settings))
    if DEVICE.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for (q, k, w), settings in prepared:
                kernels.select(q, k, w, top_k, **settings)
        row["ms"] = milliseconds(graph.replay) / len(sets)
        (q, k, w), _ = prepared[0]
        data = k.data if isinstance(k, QuantizedKeys) else k
        row["GB/s of keys"] = data.numel() * data.element_size() / row["ms"] / 1e6
    return row


def append(tokens: int, dim: int, dtype: str) -> Row:
    """Rotation, quantisation and store of new keys into a cache, against one pass over the bytes."""
    k = torch.randn(1, tokens, dim, device=DEVICE, dtype=torch.bfloat16)
    cache = quantize_index_keys(k, dtype, impl="triton")
    plain = quantize_index_keys(k.cpu(), dtype, impl="reference").to(DEVICE)
    assert torch.equal(cache.data.view(torch.uint8), plain.data.view(torch.uint8)), "append must give the same bytes"
    assert torch.equal(cache.scale, plain.scale), "append must give the same scales"
    took = milliseconds(lambda: quantize_index_keys(k, dtype, out=cache, impl="triton"))
    unfused = milliseconds(lambda: quantize_index_keys(k, dtype, out=cache, impl="reference"))
    moved = tokens * (3 * dim + 4)
    shape = f"S {tokens} Di {dim}"
    return {
        "what": "append", "form": dtype, "shape": shape, "ms": took, "unfused ms": unfused, "GB/s": moved / took / 1e6
    }  # fmt: skip


def tiles(inputs: Inputs, form: str) -> Iterator[Row]:
    """Every candidate tile of the score kernel."""
    q, k, w = inputs
    for config in kernels._score_configs(kernels._operands(q, k, w, 1.0), q.shape[1]):
        stored = StoredScores(inputs, config)
        took = milliseconds(stored.store)
        operations = 2 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2] * q.shape[3]
        yield {
            "what": "tile", "form": form, "shape": shape_of(inputs), "ms": took,
            "logits TFLOP/s": operations / took / 1e9, "config": config,
        }  # fmt: skip


def ceilings() -> Iterator[Row]:
    """What the device reaches on a copy and on matrix products, of random data."""
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source))
    yield {"what": "ceiling", "form": "copy", "shape": "1 GB", "ms": took, "GB/s": 8 * source.numel() / took / 1e6}
    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    took = milliseconds(lambda: a @ b)
    yield {"what": "ceiling", "form": "bf16", "shape": "8192^3", "ms": took, "TFLOP/s": 2 * 8192**3 / took / 1e9}
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device=DEVICE)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
        took = milliseconds(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16))
        yield {"what": "ceiling", "form": "fp8", "shape": "8192^3", "ms": took, "TFLOP/s": 2 * 8192**3 / took / 1e9}


def rows(small: bool) -> Iterator[Row]:
    """Everything, checks first."""
    native = DEVICE.type != "cuda" or torch.cuda.get_device_capability() >= (8, 9)
    forms = ("fp8", "int8", "bf16") if native else ("int8", "bf16", "fp8")
    tokens, lengths, top_k = (3, (600,), 40) if small else (2048, (65536, 131072), 2048)
    heads, dim = (2, 32) if small else (64, 128)
    limits = replace(DEFAULT, first_round=256, one_round=1) if small else DEFAULT
    for form in forms:
        yield check(make(1, tokens, lengths[0], heads, dim, form, seed=1), top_k, form, limits)
    yield check(make(3, 1, lengths[0], heads, dim, "int8", seed=2), top_k, "int8", limits)
    if DEVICE.type == "cuda":
        yield from ceilings()
    for length in lengths:
        for form in forms:
            yield prefill(make(1, tokens, length, heads, dim, form), top_k, form)
    yield from tiles(make(1, tokens, min(16384, lengths[0]), heads, dim, forms[0]), forms[0])
    for batch in (1,) if small else (1, 32):
        for size in ((heads, dim),) if small else ((8, 64), (64, 128)):
            number = 2 if small else 6 // batch + 1
            sets = [make(batch, 1, lengths[-1], *size, "int8", seed) for seed in range(number)]
            yield decode(sets, top_k, "int8")
    length = 60 if small else 131072
    inputs = make(1, length, length, *((2, 32) if small else (8, 64)), "int8")
    took = milliseconds(lambda: fused(inputs, top_k), 3)
    memory = extra_memory(lambda: fused(inputs, top_k))
    yield {
        "what": "whole prefill", "form": "int8", "shape": shape_of(inputs), "ms": took, "extra MB": memory / 1e6,
        "fused TFLOP/s": length * length * inputs[0].shape[2] * inputs[0].shape[3] / took / 1e9,
    }  # fmt: skip
    for dtype in ("int8", "fp8"):
        yield append(length, dim, dtype)


def environment() -> Row:
    """What a figure must carry."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    return {"device": name, "commit": commit, "date": datetime.date.today().isoformat()} | versions


def line(row: Row) -> str:
    numbers = (f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
    return f"{row['what']:13s} {row['form']:5s} {row['shape']:36s} " + "  ".join(numbers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--small", action="store_true", help="sizes for a first try")
    arguments = parser.parse_args()
    found = environment() | {"rows": []}
    for row in rows(arguments.small):
        found["rows"].append(row)
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1))
    print(" ".join(f"{key} {value}" for key, value in found.items() if key != "rows"))
    print("\n".join(line(row) for row in found["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
