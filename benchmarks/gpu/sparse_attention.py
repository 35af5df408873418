"""`sparse_attention` on one GPU: MLA and GQA, prefill, decode and backward.

Checks come first, against fp64 on fresh inputs with every uninitialised buffer filled with NaN. The floating-point
operations of a forward pass are counted as `2 * queries * heads * K * (D + Dv)`, those of a backward pass as
`2 * queries * heads * K * (3 D + 2 Dv)`. Dense attention through `scaled_dot_product_attention` runs next to it.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values,
`K` selected tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu import common
from benchmarks.gpu.common import (
    DEVICE,
    MEMORY,
    Row,
    error,
    expect,
    extra_memory,
    milliseconds,
    normal,
    replayed,
    with_floor,
    with_vendor,
)
from dsa.ops import sparse_attention
from dsa.ops.sparse_attention import triton as kernels
from dsa.ops.sparse_attention import vendor

Asked = tuple[tuple[str, str, float], ...]

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def mla(batch: int, tokens: int, keys: int, heads: int, top_k: int, dims: tuple[int, int], seed: int = 0) -> Tensors:
    rows = normal(batch, keys, 1, dims[0], seed=seed)
    q = normal(batch, tokens, heads, dims[0], seed=seed + 1)
    return q, rows, rows[..., : dims[1]], selection(batch, tokens, keys, top_k, seed)


def gqa(batch: int, tokens: int, keys: int, heads: tuple[int, int], top_k: int, dim: int, seed: int = 0) -> Tensors:
    q = normal(batch, tokens, heads[0], dim, seed=seed)
    k, v = normal(batch, keys, heads[1], dim, seed=seed + 1), normal(batch, keys, heads[1], dim, seed=seed + 2)
    return q, k, v, selection(batch, tokens, keys, top_k, seed)


def selection(batch: int, tokens: int, keys: int, top_k: int, seed: int) -> Tensor:
    """Random causal positions; early queries see fewer keys than places and repeat some."""
    generator = torch.Generator(DEVICE).manual_seed(common.SEED + seed)
    visible = torch.arange(keys - tokens + 1, keys + 1, device=DEVICE)[:, None]
    return (torch.rand(batch, tokens, top_k, generator=generator, device=DEVICE) * visible).int()


def overlapping(tokens: int, keys: int, top_k: int, block: int = 64) -> Tensor:
    """Half recent tokens, half shared by `block` neighbouring queries: neighbours share nearly everything."""
    end = torch.arange(keys - tokens + 1, keys + 1, device=DEVICE)[:, None]
    recent = (end - 1 - torch.arange(top_k // 2, device=DEVICE)).clamp_min(0)
    shared = selection(1, -(-tokens // block), keys, top_k - top_k // 2, 7)[0].repeat_interleave(block, 0)[:tokens]
    return torch.cat((torch.minimum(shared, end - 1), recent), dim=-1).int().unsqueeze(0)


def exact(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
    """fp64, differentiable; -1 is skipped."""
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    group = q.shape[2] // k.shape[2]
    keys, values = (x[batch, indices.clamp_min(0).long()].repeat_interleave(group, dim=3) for x in (k, v))
    scores = torch.einsum("bthd,btkhd->bthk", q, keys) * q.shape[-1] ** -0.5
    scores = scores.masked_fill((indices < 0).unsqueeze(2), -torch.inf)
    return torch.einsum("bthk,btkhd->bthd", scores.softmax(dim=-1), values)


def check(form: str, tensors: Tensors, limit: float) -> Row:
    """Forward with and without splits, both backward modes."""
    q, k, v, indices = tensors
    indices = indices.masked_fill(torch.rand(indices.shape, device=DEVICE) < 0.1, -1)
    indices[..., 0] = 0
    latent = kernels.values_in_keys(k, v, 512)
    leaves = [x.detach().double().requires_grad_() for x in ((q, k) if latent else (q, k, v))]
    wide = (*leaves, leaves[1][..., : v.shape[-1]]) if latent else leaves
    truth = exact(*wide, indices)
    upstream = normal(*truth.shape, seed=9, dtype=q.dtype)
    true_grads = torch.autograd.grad(truth, leaves, upstream.double())
    errors = {}
    for deterministic in (True, False):
        # With it torch also fills every uninitialised buffer with NaN.
        torch.use_deterministic_algorithms(deterministic)
        narrow = [x.detach().clone().requires_grad_() for x in ((q, k) if latent else (q, k, v))]
        inputs = (*narrow, narrow[1][..., : v.shape[-1]]) if latent else narrow
        out, _ = sparse_attention(*inputs, indices, impl="triton")
        mode = "fixed order" if deterministic else "atomic"
        errors[f"out {mode}"] = error(out, truth)
        for name, a, e in zip("qkv", torch.autograd.grad(out, narrow, upstream), true_grads):
            errors[f"grad {name} {mode}"] = error(a, e)
        split = kernels.forward(q, k, v, indices, None, q.shape[-1] ** -0.5, None, splits=3)[0]
        errors[f"out split {mode}"] = error(split, truth)
    torch.use_deterministic_algorithms(False)
    return expect("check sparse_attention", form, errors, limit)


def attend(tensors: Tensors) -> Tensor:
    return sparse_attention(*tensors, impl="triton")[0]


def forward_row(what: str, form: str, tensors: Tensors, asked: Asked = (), repeats: int = 20) -> Row:
    q, k, v, indices = tensors
    took = milliseconds(lambda: attend(tensors), repeats)
    operations = 2 * q.shape[0] * q.shape[1] * q.shape[2] * indices.shape[-1] * (q.shape[3] + v.shape[3])
    row = {
        "what": what, "form": form, "shape": shape_of(tensors), "ms": took, "TFLOP/s": operations / took / 1e9,
        "extra MB": extra_memory(lambda: attend(tensors)), "asked": asked,
    }  # fmt: skip
    # Everything once: at best a row that is selected twice is still in the L2.
    row_bytes = k.element_size() * k.shape[2] * (k.shape[3] + (0 if kernels.values_in_keys(k, v, 512) else v.shape[3]))
    rows = min(indices.numel(), k.shape[0] * k.shape[1])
    moved = q.nbytes * (1 + v.shape[3] / q.shape[3]) + rows * row_bytes + indices.nbytes
    gap = vendor.gap(q, k, v, None, None, indices.shape[-1])
    row = with_vendor(row, gap, lambda: sparse_attention(*tensors, impl="vendor"))
    return with_floor(row, moved, operations)


def candidate_rows(form: str, tensors: Tensors) -> Iterator[Row]:
    """Every candidate tile of the forward kernel, for the log."""
    q, k, v, _ = tensors
    for config in kernels.forward_candidates(q, k, v):
        took = milliseconds(lambda c=config: kernels.forward(*tensors, None, q.shape[-1] ** -0.5, None, config=c))
        yield {"what": "tile", "form": form, "shape": shape_of(tensors), "ms": took, "config": config}


def backward_row(form: str, tensors: Tensors, forward_rate: float, asked: Asked = ()) -> Row:
    q, k, v, indices = tensors
    scale = q.shape[-1] ** -0.5
    out, lse = kernels.forward(q, k, v, indices, None, scale, None)
    upstream = normal(*out.shape, seed=4)

    def launch() -> object:
        return kernels.backward(upstream, q, k, v, indices, None, out, lse, scale, None)

    took = milliseconds(launch, 5)
    operations = 2 * q.shape[0] * q.shape[1] * q.shape[2] * indices.shape[-1] * (3 * q.shape[3] + 2 * v.shape[3])
    rate = operations / took / 1e9
    row = {
        "what": "backward", "form": form, "shape": shape_of(tensors), "ms": took, "TFLOP/s": rate,
        "of the forward's rate": rate / forward_rate, "extra MB": extra_memory(launch), "asked": asked,
    }  # fmt: skip
    return with_floor(row, 3 * q.nbytes + 2 * (k.nbytes + v.nbytes), operations)


def shape_of(tensors: Tensors) -> str:
    q, k, v, indices = tensors
    return (
        f"B {q.shape[0]} T {q.shape[1]} S {k.shape[1]} {q.shape[2]}/{k.shape[2]}/{q.shape[3]}/{v.shape[3]} "
        f"K {indices.shape[-1]}"
    )


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
    """SDPA with shared KV heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def packed_dense(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """One query through SDPA with the heads that share a KV head laid out as queries: reads each key once."""
    packed = q.squeeze(1).unflatten(1, (k.shape[2], -1))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return lambda: torch.nn.functional.scaled_dot_product_attention(packed, k, v)


def decode_row(form: str, sets: list[Tensors], asked: Asked, peers: bool) -> Row:
    took = replayed([lambda s=s: attend(s) for s in sets])
    q, k, v, indices = sets[0]
    moved = q.shape[0] * indices.shape[-1] * k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
    row = {
        "what": "decode", "form": form, "shape": shape_of(sets[0]), "ms": took,
        "launched ms": milliseconds(lambda: attend(sets[0])), "GB/s of rows": moved / took / 1e6, "asked": asked,
    }  # fmt: skip
    if peers:
        row["sdpa ms"] = milliseconds(dense(q, k, v, causal=False))
        row["packed sdpa ms"] = milliseconds(packed_dense(q, k, v))
        row["times faster"] = min(row["sdpa ms"], row["packed sdpa ms"]) / took
    return with_floor(row, moved, 0)


def rows(small: bool) -> Iterator[Row]:
    """Everything, checks first."""
    heads, dims = (20, (80, 64)) if small else (128, (576, 512))
    tokens, keys, places = (1, 19, 17) if small else (8, 4096, 500)
    yield check("MLA bf16", mla(2, tokens, keys, heads, places, dims), 0.02)
    yield check("GQA bf16", gqa(2, tokens, keys, (6, 2) if small else (32, 8), places, dims[1] // 4), 0.02)
    half = [x.half() for x in gqa(1, tokens, keys, (4, 4), places, 24)[:3]]
    yield check("MHA fp16", (*half, selection(1, tokens, keys, places, 3)), 0.004)
    single = [x.float() for x in gqa(1, tokens, keys, (4, 2), places, 40)[:3]]
    yield check("GQA fp32", (*single, selection(1, tokens, keys, places, 4)), 1e-5)

    tokens, top_k = (2, 20) if small else (4096, 2048)
    for keys in (32,) if small else (8192, 32768, 131072):
        latent = mla(1, tokens, keys, heads, top_k, dims)
        row = forward_row("MLA prefill", "bf16", latent, (("TFLOP/s", ">=", 500), MEMORY))
        yield row
    yield from candidate_rows("MLA", latent)
    yield backward_row("MLA", mla(1, tokens // 2, keys, heads, top_k, dims), row["TFLOP/s"], (MEMORY,))
    del latent
    yield forward_row("MLA decode", "bf16", mla(2 if small else 128, 2, 32 if small else 32768, heads, top_k, dims))

    heads_of, dim, keys = ((4, 2), 16, 40) if small else ((32, 8), 128, 131072)
    for batch, times in ((1, 5),) if small else ((1, 5), (32, 10)):
        q, k, v, _ = gqa(batch, 1, keys, heads_of, top_k, dim)
        # Enough different selections that none finds its rows in the L2.
        number = 2 if small else max(2, 16 // batch)
        sets = [(q, k, v, selection(batch, 1, keys, top_k, seed)) for seed in range(number)]
        yield decode_row("GQA", sets, (("times faster", ">=", times),), peers=True)
        if batch == 1:
            yield from candidate_rows("GQA", sets[0])
        del q, k, v, sets
    tensors = gqa(1, 4 if small else 16384, keys, heads_of, top_k, dim)
    forward = forward_row("GQA last queries", "random", tensors, (MEMORY,), repeats=5)
    yield forward
    yield backward_row("GQA", tensors, forward["TFLOP/s"], (("of the forward's rate", ">=", 0.5), MEMORY))
