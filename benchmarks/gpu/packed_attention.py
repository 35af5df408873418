"""`sparse_attention` over FP8 rows of 656 bytes on one GPU: in one piece and in pages, decode and prefill.

The floating-point operations are counted as in `sparse_attention.py`. The vendor's decode kernel runs next to ours
where it is installed.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H` heads, `L`/`R` latent / rotated dims, `K` selected tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.common import (
    DEVICE,
    MEMORY,
    Row,
    error,
    expect,
    extra_memory,
    milliseconds,
    normal,
    with_floor,
    with_vendor,
)
from benchmarks.gpu.sparse_attention import exact, selection
from dsa.ops import PackedLatents, PagedLatents, pack_latents, sparse_attention
from dsa.ops.paging.types import BLOCK
from dsa.ops.sparse_attention import triton_packed as kernels
from dsa.ops.sparse_attention import vendor

Rows = PackedLatents | PagedLatents
Inputs = tuple[Tensor, Rows, Tensor]


def make(
    batch: int, tokens: int, keys: int, heads: int, top_k: int, dims: tuple[int, int], paged: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:  # fmt: skip
    """Fresh rows; made one batch row at a time, because numbers take several times the memory of rows."""
    packed = [pack_latents(normal(1, keys, sum(dims), seed=b), dims[0], impl="triton") for b in range(batch)]
    rows: Rows = PackedLatents(torch.cat([x.data for x in packed]), *dims)
    if paged:
        order = torch.randperm(batch * (keys // BLOCK), device=DEVICE).int().view(batch, -1)
        pages = torch.empty(batch * (keys // BLOCK), BLOCK, rows.data.shape[-1], dtype=torch.uint8, device=DEVICE)
        pages[order.flatten().long()] = rows.data.view(-1, BLOCK, rows.data.shape[-1])
        rows = PagedLatents(pages, order, keys, *dims)
    q = normal(batch, tokens, heads, sum(dims), seed=batch, dtype=dtype)
    return q, rows, selection(batch, tokens, keys, top_k, 11)


def attend(inputs: Inputs, impl: str = "triton") -> tuple[Tensor, Tensor]:
    q, rows, indices = inputs
    return sparse_attention(q, rows, None, indices, impl=impl)


def check(form: str, inputs: Inputs, limit: float) -> Row:
    """Against fp64 attention over what the rows say, with and without splits, in a GPU's own e4m3 and decoded bytes."""
    q, rows, indices = inputs
    indices = indices.masked_fill(torch.rand(indices.shape, device=DEVICE) < 0.1, -1)
    indices[..., 0] = 0
    plain = rows.gather() if isinstance(rows, PagedLatents) else rows
    key = plain.unpack().double().unsqueeze(2)
    truth = exact(q.double(), key, key[..., : plain.latent_dim], indices)
    data, table, page = (rows.data, None, 0)  if isinstance(rows, PackedLatents) else (
        rows.pages.flatten(0, 1), rows.block_table, rows.block
    )  # fmt: skip
    options = (rows.shape[1], page, rows.latent_dim, q.shape[-1] ** -0.5, None)
    errors = {"out": error(attend((q, rows, indices))[0], truth)}
    for splits in (1, 3):
        errors[f"out {splits} splits"] = error(
            kernels.forward(q, data, table, indices, None, *options, splits)[0], truth
        )
    found, kernels.has_fp8 = kernels.has_fp8, lambda device: False
    try:
        errors["out from bytes"] = error(kernels.forward(q, data, table, indices, None, *options)[0], truth)
    finally:
        kernels.has_fp8 = found
    return expect("check packed", form, errors, limit)


def measure(what: str, form: str, inputs: Inputs, asked: tuple[tuple[str, str, float], ...]) -> Row:
    q, rows, indices = inputs
    took = milliseconds(lambda: attend(inputs))
    operations = 2 * q.shape[0] * q.shape[1] * q.shape[2] * indices.shape[-1] * (q.shape[3] + rows.latent_dim)
    shape = f"B {q.shape[0]} T {q.shape[1]} S {rows.shape[1]} H {q.shape[2]} K {indices.shape[-1]}"
    row = {
        "what": what, "form": form, "shape": shape, "ms": took, "TFLOP/s": operations / took / 1e9,
        "extra MB": extra_memory(lambda: attend(inputs)), "asked": asked,
    }  # fmt: skip
    data = rows.data if isinstance(rows, PackedLatents) else rows.pages
    selected = indices.numel() * data.shape[-1]
    gap = vendor.gap(q, rows, None, None, None, indices.shape[-1])
    row = with_vendor(row, gap, lambda: attend(inputs, "vendor"))
    return with_floor(row, min(selected, data.nbytes) + 2 * q.nbytes + indices.nbytes, operations)


def candidate_rows(form: str, inputs: Inputs) -> Iterator[Row]:
    """Every candidate tile, for the log."""
    q, rows, indices = inputs
    assert isinstance(rows, PackedLatents)
    options = (rows.shape[1], 0, rows.latent_dim, q.shape[-1] ** -0.5, None, None)
    for config in kernels.candidates(q, rows.data.shape[-1]):
        took = milliseconds(lambda c=config: kernels.forward(q, rows.data, None, indices, None, *options, c))
        yield {"what": "tile", "form": form, "shape": f"packed H {q.shape[2]}", "ms": took, "config": config}


def rows(small: bool) -> Iterator[Row]:
    """Everything, checks first."""
    heads, dims = (20, (64, 16)) if small else (128, (512, 64))
    tokens, keys, places = (1, 64, 17) if small else (8, 4096, 500)
    for paged in (False, True):
        yield check(f"bf16{' paged' if paged else ''}", make(2, tokens, keys, heads, places, dims, paged), 0.02)
    yield check("fp16", make(1, tokens, keys, 4, places, dims, dtype=torch.float16), 0.004)
    yield check("fp32", make(1, tokens, keys, 4, places, dims, dtype=torch.float32), 1e-5)

    top_k, batch, length = (20, 2, 64) if small else (2048, 128, 32768)
    decode = (("TFLOP/s", ">=", 330.0),)
    inputs = make(batch, 2, length, heads, top_k, dims)
    yield measure("MLA decode, FP8 rows", "bf16", inputs, decode)
    yield from candidate_rows("decode", inputs)
    del inputs
    yield measure("MLA decode, FP8 rows", "paged", make(batch, 2, length, heads, top_k, dims, paged=True), decode)
    yield measure("MLA decode, FP8 rows", "16 heads", make(batch, 1, length, 16, top_k, dims, paged=True), ())
    length = 128 if small else 131072
    yield measure("MLA decode, FP8 rows", "one", make(1, 1, length, heads, top_k, dims, paged=True), (MEMORY,))
    tokens = 2 if small else 4096
    yield measure("MLA prefill, FP8 rows", "bf16", make(1, tokens, length, heads, top_k, dims), (MEMORY,))
