"""What is appended to caches, each in one kernel: index keys, FP8 rows, and keys out of an indexer's projection.

Shapes: `B` batch, `T` tokens, `S` key tokens, `C` hidden size, `Di` index head dim, `L`/`R` latent / rotated dims.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.common import DEVICE, Row, error, expect, milliseconds, normal, with_floor
from dsa.ops import IndexWeights, QuantizedKeys, index_projection, pack_latents, quantize_index_keys
from dsa.ops.index_projection import rope_tables


def check_keys(tokens: int, dim: int, dtype: str) -> Row:
    """Raises unless the cache holds the bytes of the reference on a CPU."""
    k = normal(1, tokens, dim)
    cache = quantize_index_keys(torch.zeros_like(k), dtype, impl="triton")
    for power_of_two in (True, False):
        quantize_index_keys(k, dtype, power_of_two=power_of_two, out=cache, impl="triton")
        plain = quantize_index_keys(k.cpu(), dtype, power_of_two=power_of_two, impl="reference").to(DEVICE)
        assert torch.equal(cache.data.view(torch.uint8), plain.data.view(torch.uint8)), f"{dtype}: other bytes"
        assert torch.equal(cache.scale, plain.scale), f"{dtype}: other scales"
    return {"what": "check append", "form": dtype, "shape": f"S {tokens} Di {dim}"}


def check_rows(tokens: int, dims: tuple[int, int]) -> Row:
    """Raises unless the rows are those of the reference on a CPU, byte for byte."""
    x = normal(1, tokens, sum(dims))
    for power_of_two in (True, False):
        found = pack_latents(x, dims[0], power_of_two=power_of_two, impl="triton")
        plain = pack_latents(x.cpu(), dims[0], power_of_two=power_of_two, impl="reference").to(DEVICE)
        assert torch.equal(found.data, plain.data), "FP8 rows: other bytes"
    return {"what": "check append", "form": "FP8 rows", "shape": f"S {tokens} L {dims[0]} R {dims[1]}"}


def projection(tokens: int, width: int, heads: int, dim: int) -> tuple[Tensor, IndexWeights, tuple[Tensor, Tensor]]:
    shapes = ((heads * dim, width), (dim, width), (heads, width), (dim,), (dim,))
    weights = IndexWeights(*(normal(*shape, seed=i) / shape[-1] ** 0.5 for i, shape in enumerate(shapes)))
    angles = normal(1, tokens, dim // 4, seed=8, dtype=torch.float32)
    return normal(1, tokens, width, seed=9), weights, rope_tables(angles.cos(), angles.sin())


def check_projection(tokens: int, width: int, heads: int, dim: int) -> Row:
    """The keys in fp32 storage, against the reference in fp64, and rounded ones against their own step."""
    hidden, weights, rope = projection(tokens, width, heads, dim)
    wide = IndexWeights(*(x.double() for x in weights.tensors))
    exact = torch.zeros(1, tokens, dim, device=DEVICE)
    index_projection(hidden.double(), wide, tuple(x.double() for x in rope), exact, impl="reference")
    keys = torch.zeros_like(exact)
    index_projection(hidden, weights, rope, keys, impl="triton")
    errors = {"keys": error(keys, exact.double())}
    cache = quantize_index_keys(torch.zeros_like(exact), impl="triton")
    index_projection(hidden, weights, rope, cache, impl="triton")
    errors["int8"] = error(cache.dequantize(), quantize_index_keys(exact, impl="triton").dequantize().double())
    return expect("check append", "projected", errors, 0.02)


def append_keys(tokens: int, dim: int, dtype: str) -> Row:
    """Rotation, quantisation and store of new keys into a cache; each byte moves once."""
    k = normal(1, tokens, dim)
    cache = quantize_index_keys(k, dtype, impl="triton")
    took = milliseconds(lambda: quantize_index_keys(k, dtype, out=cache, impl="triton"))
    unfused = milliseconds(lambda: quantize_index_keys(k, dtype, out=cache, impl="reference"))
    moved = tokens * (3 * dim + 4)
    row = {
        "what": "append", "form": dtype, "shape": f"S {tokens} Di {dim}", "ms": took, "unfused ms": unfused,
        "GB/s": moved / took / 1e6,
    }  # fmt: skip
    return with_floor(row, moved, 0)


def append_rows(tokens: int, dims: tuple[int, int]) -> Row:
    x = normal(1, tokens, sum(dims))
    cache = pack_latents(x, dims[0], impl="triton")
    took = milliseconds(lambda: pack_latents(x, dims[0], out=cache, impl="triton"))
    unfused = milliseconds(lambda: pack_latents(x, dims[0], out=cache, impl="reference"))
    moved = x.nbytes + cache.data.nbytes
    row = {
        "what": "append", "form": "FP8 rows", "shape": f"S {tokens} L {dims[0]} R {dims[1]}", "ms": took,
        "unfused ms": unfused, "GB/s": moved / took / 1e6,
    }  # fmt: skip
    return with_floor(row, moved, 0)


def append_projected(tokens: int, width: int, heads: int, dim: int) -> Row:
    hidden, weights, rope = projection(tokens, width, heads, dim)
    cache: QuantizedKeys = quantize_index_keys(torch.zeros(1, tokens, dim, device=DEVICE), impl="triton")
    times = {
        impl: milliseconds(lambda impl=impl: index_projection(hidden, weights, rope, cache, queries=False, impl=impl))
        for impl in ("triton", "reference")
    }
    row = {
        "what": "append", "form": "projected", "shape": f"T {tokens} C {width} Di {dim}", "ms": times["triton"],
        "unfused ms": times["reference"],
    }  # fmt: skip
    return with_floor(row, hidden.nbytes + tokens * (dim + 4), 2 * tokens * width * dim)


def rows(small: bool) -> Iterator[Row]:
    """Everything, checks first."""
    tokens, dims, sizes = (70, (64, 16), (40, 2, 32)) if small else (131072, (512, 64), (4096, 8, 64))
    dim = 32 if small else 128
    for dtype in ("int8", "fp8"):
        yield check_keys(tokens, dim, dtype)
    yield check_rows(tokens, dims)
    yield check_projection(min(tokens, 4096), *sizes)
    for dtype in ("int8", "fp8"):
        yield append_keys(tokens, dim, dtype)
    yield append_rows(tokens, dims)
    for count in (1,) if small else (1, 4096):
        yield append_projected(count, *sizes)
