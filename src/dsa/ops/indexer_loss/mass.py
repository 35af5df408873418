"""Which queries count in the loss: what every implementation has to agree on."""

from __future__ import annotations

import torch


def least_mass(dtype: torch.dtype) -> float:
    """The attention mass on the compared tokens from which a query counts, by the accumulation dtype.

    With less, shares that matter would be subnormal numbers, which lose their digits.
    """
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps
