"""Operations over several selections of each query: heads in as many parts, each with a selection of its own.

Selection `i` of `Gs` belongs to the `i`-th part of the KV heads and to the query heads that read them, so an operation
over all of them is the operation over each part. The parts are views: no key or value is copied.

Shapes: `B` batch, `T` query tokens, `H`/`G` query / KV heads, `Gs` selections of a query, `K` selected tokens.
"""

from __future__ import annotations

from torch import Tensor

from dsa.ops.checks import check_tensor, describe


def check_selected(op: str, indices: Tensor, q: Tensor, groups: int) -> None:
    """Checks integers `[B, T, K]`, or `[B, T, Gs, K]` with `Gs` a divisor of the KV heads, for queries `[B, T, ...]`.

    Raises:
        TypeError: Not a tensor of integers.
        ValueError: Wrong shape or device, or selections that do not divide the KV heads.
    """
    batch, tokens = q.shape[:2]
    if not isinstance(indices, Tensor) or indices.ndim != 4:
        check_tensor(op, "indices", indices, "[B, T, K]", (batch, tokens, None), device=q.device, integer=True)
        return
    shape = (batch, tokens, None, None)
    check_tensor(op, "indices", indices, "[B, T, Gs, K]", shape, device=q.device, integer=True)
    check_selections(op, "indices", indices, groups)


def check_selections(op: str, name: str, tensor: Tensor, groups: int) -> None:
    """Checks that the selections of `tensor` `[B, T, Gs, ...]` divide the KV heads.

    Raises:
        ValueError: They do not.
    """
    selections = tensor.shape[2]
    if selections == 0 or groups % selections:
        raise ValueError(
            f"{op}: the selections of {name} must divide the {groups} KV heads, got {selections} in {describe(tensor)}"
        )


def parts_of(x: Tensor, dim: int, selections: int) -> tuple[Tensor, ...]:
    """`x` with the heads of each selection along `dim`, as views."""
    return x.unflatten(dim, (selections, x.shape[dim] // selections)).unbind(dim)
