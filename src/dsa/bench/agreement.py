"""Checks that come before any figure: what was timed is compared with the reference on a few queries.

Shapes: `R` compared queries, `S` keys, `H`/`G` query / KV heads, `D` head dim, `K` top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa.bench.measure import Disagreement
from dsa.bench.tensors import LayerTensors, Sizes
from dsa.ops import index_topk

ROWS = 16
LARGEST_ERROR = 1e-4
"""Allowed difference from fp64, relative to the largest number. Exponentials in fp32 lose about 1e-6."""


def spread_rows(first: int, stop: int, count: int = ROWS) -> Tensor:
    """A few of the queries from `first` to `stop`, evenly spread, the last one among them."""
    return torch.linspace(first, stop - 1, min(count, stop - first)).round().long().unique()


def reference_selection(tensors: LayerTensors, sizes: Sizes, rows: Tensor) -> Tensor:
    """int32 `[1, R, K]`, what the specification selects for some queries of a right-aligned causal layer."""
    return _selection(tensors, sizes, rows, "reference")


def check_selection(tensors: LayerTensors, sizes: Sizes, rows: Tensor) -> tuple[Tensor, str]:
    """The reference's selection for some queries, and a word on what was compared.

    Raises:
        Disagreement: What `auto` selects differs. With int8 keys there is no tolerance.
    """
    expected = reference_selection(tensors, sizes, rows)
    actual = _selection(tensors, sizes, rows, "auto")
    if not torch.equal(actual, expected):
        wrong = int((actual != expected).any(dim=-1).sum())
        raise Disagreement(f"index_topk selects other tokens than the reference for {wrong} of {len(rows)} queries")
    return expected, f"index_topk equal for {len(rows)} queries"


def _selection(tensors: LayerTensors, sizes: Sizes, rows: Tensor, impl: str) -> Tensor:
    keys, queries = tensors.index_key.shape[1], tensors.index_query.shape[1]
    end = (rows + keys - queries + 1).to(torch.int32)[None]
    return index_topk(
        tensors.index_query[:, rows],
        tensors.index_key,
        tensors.index_weight[:, rows],
        sizes.top_k,
        sinks=sizes.sinks,
        local=sizes.local,
        key_start=torch.zeros_like(end),
        key_end=end,
        impl=impl,  # type: ignore[arg-type]
    )


def check_sparse(name: str, out: Tensor, tensors: LayerTensors, rows: Tensor, indices: Tensor) -> str:
    """Compares `out [1, n, H, D]` on some rows with attention over `indices [1, R, K]` in fp64."""
    chosen = [indices[0, row][indices[0, row] >= 0].long() for row in range(len(rows))]
    return _check_rows(name, out, tensors, rows, chosen)


def check_dense(name: str, out: Tensor, tensors: LayerTensors, rows: Tensor) -> str:
    """The same over all earlier tokens."""
    before = tensors.key.shape[1] - tensors.query.shape[1]
    return _check_rows(name, out, tensors, rows, [torch.arange(int(row) + before + 1) for row in rows])


def _check_rows(name: str, out: Tensor, tensors: LayerTensors, rows: Tensor, chosen: list[Tensor]) -> str:
    exact = torch.stack([_attend(tensors, int(row), positions) for row, positions in zip(rows, chosen, strict=True)])
    return check_close(name, out[0, rows], exact)


def check_close(name: str, actual: Tensor, exact: Tensor, allowed: float = LARGEST_ERROR) -> str:
    """Compares with what is right; the error is relative to the largest number.

    Raises:
        Disagreement: It is too large, or not a number.
    """
    error = float((actual.double() - exact.double()).abs().max() / exact.double().abs().max())
    if not error <= allowed:
        raise Disagreement(f"{name} differs from the reference by {error:.2g} where {allowed:g} is allowed")
    return f"{name} within {error:.1g}"


def _attend(tensors: LayerTensors, row: int, positions: Tensor) -> Tensor:
    """One query over the tokens at some positions, fp64 `[H, D]`."""
    query = tensors.query[0, row].double()
    key, value = tensors.key[0, positions].double(), tensors.value[0, positions].double()
    heads, groups = query.shape[0], key.shape[1]
    grouped = query.view(groups, heads // groups, -1)
    scores = torch.einsum("gqd,sgd->gqs", grouped, key) * query.shape[-1] ** -0.5
    return torch.einsum("gqs,sgd->gqd", scores.softmax(dim=-1), value).reshape(heads, -1)
