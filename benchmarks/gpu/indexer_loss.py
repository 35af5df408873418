"""`indexer_loss` on one GPU, forward and gradients, next to dense attention forward and backward at the same shape.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `H`/`G` query / KV heads,
`D` head dim, `K` selected tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.common import DEVICE, MEMORY, Row, error, expect, extra_memory, milliseconds, normal
from benchmarks.gpu.sparse_attention import selection
from dsa.ops import indexer_loss


def make(
    tokens: int, keys: int, heads: tuple[int, int], dim: int, index: tuple[int, int], seed: int = 0
) -> tuple[Tensor, ...]:
    """`q_index, k_index, w_index, q, k`, with index scores of a trained indexer's size."""
    return (
        normal(1, tokens, *index, seed=seed),
        normal(1, keys, index[1], seed=seed + 1),
        normal(1, tokens, index[0], seed=seed + 2) * index[0] ** -0.5,
        normal(1, tokens, heads[0], dim, seed=seed + 3),
        normal(1, keys, heads[1], dim, seed=seed + 4),
    )


def check(form: str, tensors: tuple[Tensor, ...], indices: Tensor | None, limit: float) -> Row:
    """Loss and gradients against the reference in fp64, with uninitialised buffers filled with NaN."""
    results = []
    for dtype, impl in ((torch.float64, "reference"), (tensors[0].dtype, "triton")):
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(impl == "triton", warn_only=True)
        cast = [x.detach().to(dtype) for x in tensors]
        leaves = [x.requires_grad_() for x in cast[:3]]
        loss = indexer_loss(*leaves, *cast[3:], indices=indices, sinks=2, local=5, impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.use_deterministic_algorithms(False)
    names = ("loss", "grad q", "grad k", "grad w")
    return expect("check indexer_loss", form, {n: error(a, e) for n, e, a in zip(names, *results)}, limit)


def both_passes(tensors: tuple[Tensor, ...], indices: Tensor | None) -> Tensor:
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    loss = indexer_loss(*leaves, *tensors[3:], indices=indices, impl="triton")
    loss.backward()
    return loss


def dense_both_passes(q: Tensor, k: Tensor) -> None:
    q, k = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k))
    v = k.detach().clone().requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out.backward(out.detach())


def rows(small: bool) -> Iterator[Row]:
    """Everything, checks first."""
    heads, dim, index = ((4, 2), 16, (2, 16)) if small else ((32, 8), 128, (8, 64))
    tokens, keys = (5, 21) if small else (300, 700)
    tensors = make(tokens, keys, heads, dim, index, seed=3)
    places = selection(1, tokens, keys, 20 if small else 150, 5)
    for form, indices in (("dense", None), ("selected", places)):
        yield check(f"{form} bf16", tensors, indices, 0.03)
        yield check(f"{form} fp32", tuple(x.float() for x in tensors), indices, 1e-4)

    length = 32 if small else 32768
    tensors = make(length, length, heads, dim, index)
    shape = f"n {length} {heads[0]}/{heads[1]}/{dim} Hi {index[0]} Di {index[1]}"
    took = milliseconds(lambda: both_passes(tensors, None), 3)
    dense_took = milliseconds(lambda: dense_both_passes(*tensors[3:]), 3)
    yield {
        "what": "indexer_loss, both", "form": "dense", "shape": shape, "ms": took, "sdpa both ms": dense_took,
        "times SDPA": took / dense_took, "extra MB": extra_memory(lambda: both_passes(tensors, None)),
        "asked": (("times SDPA", "<=", 2),),
    }  # fmt: skip
    tokens, top_k = (3, 20) if small else (4096, 2048)
    tail = tuple(x[:, -tokens:] if i in (0, 2, 3) else x for i, x in enumerate(tensors))
    places = selection(1, tokens, length, top_k, 1)
    took = milliseconds(lambda: both_passes(tail, places), 5)
    yield {
        "what": "indexer_loss, both", "form": "selected", "shape": f"T {tokens} S {shape[2:]} K {top_k}", "ms": took,
        "extra MB": extra_memory(lambda: both_passes(tail, places)),
    }  # fmt: skip
    if DEVICE.type == "cuda":
        length = 131072
        tensors = make(length, length, heads, dim, index)
        yield {
            "what": "indexer_loss, memory", "form": "dense", "shape": f"n {length}",
            "extra MB": extra_memory(lambda: both_passes(tensors, None)), "asked": (MEMORY,),
        }  # fmt: skip
