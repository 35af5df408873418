"""Names of the implementations of an operation, and how `impl` is resolved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Impl = Literal["auto", "reference", "native", "triton", "vendor"]

_NAMES = get_args(Impl)


def resolve_impl(op: str, impl: str, gaps: Mapping[str, str | None]) -> str:
    """Chooses the implementation that runs.

    Args:
        op: Name of the operation, for messages.
        impl: What the caller asked for.
        gaps: By implementation, fastest first, why it cannot run this input, or `None` where it can.

    Returns:
        The name of an implementation whose gap is `None`.

    Raises:
        ValueError: `impl` is not a name of `Impl`.
        NotImplementedError: `impl` was asked for by name and cannot run this input. Nothing falls back.
    """
    if impl not in _NAMES:
        raise ValueError(f"{op}: impl must be one of {', '.join(_NAMES)}, got {impl!r}")
    able = [name for name, gap in gaps.items() if gap is None]
    if impl == "auto":
        assert able, f"{op} has no implementation for this input"
        return able[0]
    if impl in able:
        return impl
    reason = gaps.get(impl) or f"{op} has no such implementation"
    raise NotImplementedError(f"{op}: impl={impl!r} cannot run this: {reason}. Use {' or '.join(able)}.")
