"""Gathering selected tokens, and products over them that do not repeat keys for the heads that share them.

Shapes: `S` key tokens, `H`/`G` query / KV heads, `D` head dim, `K` selected tokens, `n` queries of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(source: Tensor, indices: Tensor, hidden: Tensor | None, wide: torch.dtype) -> Tensor:
    """Rows `[n, K, ...]` of `source[S, ...]` in the dtype `wide`.

    Args:
        indices: Integers `[n, K]`; negative ones read row 0.
        hidden: Mask `[n, K]` of rows to zero, because a NaN read for padding must not come back as `0 * NaN`.
    """
    rows = source.index_select(0, indices.clamp_min(0).reshape(-1)).view(*indices.shape, *source.shape[1:]).to(wide)
    if hidden is not None:
        rows.masked_fill_(hidden.view(*hidden.shape, *(1 for _ in source.shape[1:])), 0.0)
    return rows


def scatter_tokens(total: Tensor, indices: Tensor, rows: Tensor) -> None:
    """`total[indices[i, j]] += rows[i, j]` for `total[S, ...]`; negative indices must bring zeros."""
    total.index_add_(0, indices.clamp_min(0).reshape(-1), rows.flatten(0, 1))


def scores_per_group(q: Tensor, keys: Tensor) -> Tensor:
    """`q[n, H, D] . keys[n, K, G, D]` with each KV head's own query heads, `[n, H, K]`."""
    shared = q.shape[1] // keys.shape[2]
    parts = [
        torch.bmm(q[:, g * shared : (g + 1) * shared], keys[:, :, g].transpose(1, 2)) for g in range(keys.shape[2])
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def mix_per_group(weights: Tensor, values: Tensor) -> Tensor:
    """`weights[n, H, K] @ values[n, K, G, D]` with each KV head's own query heads, `[n, H, D]`."""
    shared = weights.shape[1] // values.shape[2]
    parts = [torch.bmm(weights[:, g * shared : (g + 1) * shared], values[:, :, g]) for g in range(values.shape[2])]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def spread_per_group(weights: Tensor, rows: Tensor, groups: int) -> Tensor:
    """`weights[n, H, K]^T @ rows[n, H, D]` with each KV head's own query heads, `[n, K, G, D]`."""
    shared = weights.shape[1] // groups
    heads = (slice(g * shared, (g + 1) * shared) for g in range(groups))
    return torch.stack([torch.bmm(weights[:, part].transpose(1, 2), rows[:, part]) for part in heads], dim=2)
