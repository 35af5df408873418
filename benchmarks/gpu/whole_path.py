"""Sparse prefill with everything it takes, index, selection and attention, compared with dense attention through SDPA.

Selections: those that random index tensors make, which hardly overlap; synthetic ones whose neighbours share nearly
all; and those recorded from a trained model (`record_selections.py`), where a file is given. How far neighbours share
is part of each row: how many times `K` the union of 16 neighbouring selections is long, 1 where they are the same.

Shapes: `T` query tokens, `H`/`G` query / KV heads, `D` head dim, `Hi`/`Di` index heads / index head dim, `K` top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import index_topk as index
from benchmarks.gpu.common import DEVICE, MEMORY, Row, error, expect, extra_memory, milliseconds
from benchmarks.gpu.sparse_attention import dense, exact, gqa, overlapping
from dsa.ops import index_topk, sparse_attention

NEIGHBOURS = 16


def union_length(indices: Tensor, blocks: int = 64) -> float:
    """Length of the union of neighbouring selections `[T, K]` over `K`, mean over some blocks of queries."""
    count = indices.shape[0] // NEIGHBOURS
    if not count:
        return 1.0
    places = torch.linspace(0, count - 1, min(blocks, count)).long().unique() * NEIGHBOURS
    lengths = []
    for place in places.tolist():
        block = indices[place : place + NEIGHBOURS]
        here = block[block >= 0].unique().numel()
        lengths.append(here / max(1, int((block[-1] >= 0).sum())))
    return sum(lengths) / len(lengths)


def read(path: Path) -> Tensor:
    """int32 `[1, T, K]`, as `record_selections.py` wrote it."""
    from safetensors.torch import load_file

    return load_file(path)["selection"].to(DEVICE).int().unsqueeze(0)


def rows(small: bool, recorded: Path | None = None) -> Iterator[Row]:
    """Everything, checks first."""
    (heads, dim), (index_heads, index_dim) = (((4, 2), 16), (2, 32)) if small else (((32, 8), 128), (8, 64))
    tokens, top_k = (32, 20) if small else (131072, 2048)
    length = 24 if small else 1500
    q, k, v, _ = gqa(1, length, length, heads, 1, dim, seed=70)
    inputs = index.make(1, length, length, index_heads, index_dim, "int8", seed=71)
    chosen = index_topk(*inputs, length // 3, sinks=2, local=3, impl="triton")
    out = sparse_attention(q, k, v, chosen, impl="triton")[0]
    few = torch.linspace(0, length - 1, 8).long().to(DEVICE)
    truth = exact(q[:, few].double(), k.double(), v.double(), chosen[:, few])
    yield expect("check whole path", "bf16", {"out": error(out[:, few], truth)}, 0.02)

    forms: dict[str, Tensor | None] = {"random": None, "overlap": overlapping(tokens, tokens, top_k)}
    if recorded is not None:
        forms["recorded"] = read(recorded)
    for form, selected in forms.items():
        tokens = tokens if selected is None else selected.shape[1]
        places = top_k if selected is None else selected.shape[2]
        q, k, v, _ = gqa(1, tokens, tokens, heads, 1, dim)
        inputs = index.make(1, tokens, tokens, index_heads, index_dim, "int8")

        def select(inputs: index.Inputs = inputs, places: int = places) -> Tensor:
            return index_topk(*inputs, places, sinks=index.SINKS, local=min(index.LOCAL, places // 2), impl="triton")

        # Where the selection is given the index runs as well, and its result is left.
        def whole(select=select, q=q, k=k, v=v, selected=selected) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
            own = select()
            return sparse_attention(q, k, v, own if selected is None else selected, impl="triton")

        given = select() if selected is None else selected
        took, sdpa = milliseconds(whole, 3), milliseconds(dense(q, k, v, causal=True), 3)
        times = {"index ms": milliseconds(select, 3)}
        times["attend ms"] = milliseconds(lambda q=q, k=k, v=v, i=given: sparse_attention(q, k, v, i, impl="triton"), 3)
        yield {
            "what": "GQA prefill, whole path", "form": form,
            "shape": f"T {tokens} {heads[0]}/{heads[1]}/{dim} K {places}",
            "ms": took, **times, "sdpa ms": sdpa, "times faster": sdpa / took,
            "union of 16 / K": union_length(given[0]), "extra MB": extra_memory(whole) - given.nbytes / 1e6,
            "asked": (("times faster", ">=", 1 if form == "random" else 3), MEMORY),
        }  # fmt: skip
