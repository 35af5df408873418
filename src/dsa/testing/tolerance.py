"""The one place that says how close is close enough: an error is judged by what fp32 arithmetic itself loses."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_yardstick(
    actual: Tensor, naive: Tensor, exact: Tensor, *, factor: float = 2.0, what: str = "result"
) -> None:
    """Checks that an implementation errs at most `factor` times as much as the naive computation.

    The allowance on top, 16 units of the last place of the result's dtype at the size of the largest number,
    covers cases so small that the naive error happens to be zero. Numbers that are not finite must agree.

    Args:
        actual: What the implementation returned.
        naive: The plain formulation in the implementation's accumulation dtype.
        exact: The plain formulation in fp64.
        factor: Allowed ratio of the largest errors.
        what: Name for the message.

    Raises:
        AssertionError: A larger error, another shape, or a NaN or infinity in another place.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(actual[~finite].double().nan_to_num(nan=0.5), exact[~finite].nan_to_num(nan=0.5)), (
        f"{what}: expected {exact[~finite]}, got {actual[~finite]}"
    )
    if not finite.any():
        return
    error = (actual.double() - exact)[finite].abs().max().item()
    naive_error = (naive.double() - exact)[finite].abs().max().item()
    size = exact[finite].abs().max().item()
    allowed = factor * naive_error + 16 * torch.finfo(actual.dtype).eps * size
    assert error <= allowed, f"{what}: largest error {error:.3g}, allowed {allowed:.3g} (naive {naive_error:.3g})"
