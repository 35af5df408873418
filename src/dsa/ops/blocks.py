"""How many queries a reference implementation takes at once, and in which precision it computes.

Every reference streams over blocks of queries, so that its memory is `O(n * block)`.
"""

from __future__ import annotations

import torch

BUDGET_BYTES = {"cpu": 16 << 20, "other": 1 << 30}
"""Size of one block's temporaries. On a CPU what its caches hold: larger blocks cost page faults."""


def rows_per_block(bytes_per_row: int, device: torch.device) -> int:
    """How many rows of temporaries fit the budget of `device`; at least one."""
    budget = BUDGET_BYTES["cpu" if device.type == "cpu" else "other"]
    return max(1, budget // max(1, bytes_per_row))


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Accumulation is fp32, or fp64 for fp64 inputs."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> torch.autocast:
    """Context in which the caller's autocast does not narrow the matrix products of an operation."""
    return torch.autocast(device.type, enabled=False)
