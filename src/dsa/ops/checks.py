"""Checks of arguments that several operations share. Errors name the argument, what was expected and came."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST_FACTOR = 2e38
"""Kernels compute in powers of two: a factor times log2(e) has to stay within fp32."""

_SMALLEST_SOFTCAP = torch.finfo(torch.float32).tiny


def describe(value: object) -> str:
    """How a wrong argument is shown: dtype and shape of a tensor, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(
    op: str,
    name: str,
    tensor: object,
    legend: str,
    sizes: tuple[int | None, ...],
    *,
    device: torch.device | None = None,
    integer: bool = False,
) -> None:
    """Checks type, kind of dtype, shape and device of one argument.

    Args:
        legend: The shape as it is documented, such as `[B, T, H, D]`.
        sizes: What each dimension must be; `None` accepts any size.
        device: Where it must live; `None` accepts any.
        integer: Whether int32 or int64 is wanted instead of floating-point numbers.

    Raises:
        TypeError: Not a tensor, or the wrong kind of dtype.
        ValueError: Wrong shape or device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {legend}, got {describe(tensor)}")
    if integer and tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64 {legend}, got {describe(tensor)}; convert it")
    if not integer and (not tensor.is_floating_point() or tensor.dtype.itemsize < 2):
        raise TypeError(f"{op}: {name} must be fp64, fp32, bf16 or fp16, {legend}, got {describe(tensor)}; convert it")
    matches = tensor.ndim == len(sizes) and all(want is None or have == want for have, want in zip(tensor.shape, sizes))
    if not matches:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{op}: {name} must be {legend} = [{wanted}], got {describe(tensor)}; reshape or slice it")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the queries, got {tensor.device}; move it there")


def check_count(op: str, name: str, value: object, minimum: int) -> None:
    """Checks a whole number with a lower bound."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be a whole number, got {describe(value)}")
    if value < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value}")


def check_scale(op: str, name: str, value: float | None, default: float) -> float:
    """The factor to use: `default` for `None`, else a finite number."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} must be a number or None, got {describe(value)}; pass a Python float")
    if not abs(value) <= _LARGEST_FACTOR:
        raise ValueError(
            f"{op}: {name} must be finite and at most {_LARGEST_FACTOR:g} in size, got {value}; leave it out for the "
            f"default {default:.6g}"
        )
    return float(value)


def check_softcap(op: str, softcap: float | None) -> None:
    """Checks that a softcap, where given, is finite, positive, and no subnormal number of fp32."""
    if softcap is None:
        return
    if check_scale(op, "softcap", softcap, 1.0) <= 0:
        raise ValueError(f"{op}: softcap must be positive, got {softcap}; pass None for no softcap")
    if softcap < _SMALLEST_SOFTCAP:
        raise ValueError(
            f"{op}: softcap must be at least {_SMALLEST_SOFTCAP:.3g}, the smallest normal number of fp32, "
            f"got {softcap}; raise it"
        )


def check_attention(
    op: str, q: Tensor, k: Tensor, v: Tensor | None, sink_logits: Tensor | None, softcap: float | None
) -> None:
    """Checks the common arguments: `q[B, T, H, D]`, `k[B, S, G, D]`, `v[B, S, G, Dv]`, `sink_logits[H]`.

    Raises:
        TypeError: A tensor of the wrong kind, or keys or values wider than the queries.
        ValueError: Shapes that do not fit together, or another device.
    """
    check_softcap(op, softcap)
    if sink_logits is None and _fit_on_cpu(q, k, v):
        return
    check_tensor(op, "q", q, "[B, T, H, D]", (None,) * 4)
    batch, _, heads, head_dim = q.shape
    check_tensor(op, "k", k, "[B, S, G, D]", (batch, None, None, head_dim), device=q.device)
    keys, groups = k.shape[1:3]
    if head_dim == 0 or groups == 0 or heads == 0 or heads % groups:
        raise ValueError(
            f"{op}: the heads of q must be a multiple of the heads of k, and no head empty: "
            f"got q {describe(q)} and k {describe(k)}"
        )
    if v is not None:
        check_tensor(op, "v", v, "[B, S, G, Dv]", (batch, keys, groups, None), device=q.device)
    for name, tensor in (("k", k), ("v", v)):
        if tensor is not None and tensor.dtype.itemsize > q.dtype.itemsize:
            raise TypeError(
                f"{op}: {name} must not be wider than q ({q.dtype}), got {tensor.dtype}; convert one of them"
            )
    if sink_logits is not None:
        check_tensor(op, "sink_logits", sink_logits, "[H]", (heads,), device=q.device)


_BYTES = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def _fit_on_cpu(q: Tensor, k: Tensor, v: Tensor | None) -> bool:
    """Whether nothing is wrong with them, without looking for what it is: every decoded token asks, in every layer."""
    if not type(q) is type(k) is type(v) is Tensor or not (q.ndim == k.ndim == v.ndim == 4):
        return False
    batch, _, heads, head_dim = q.shape
    key_batch, keys, groups, key_dim = k.shape
    width = _BYTES.get(q.dtype, 0)
    return (
        (batch, head_dim) == (key_batch, key_dim)
        and v.shape[:3] == (batch, keys, groups)
        and head_dim > 0
        and groups > 0
        and heads > 0
        and heads % groups == 0
        and _BYTES.get(k.dtype, 99) <= width
        and _BYTES.get(v.dtype, 99) <= width
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
    )


def check_indices(op: str, indices: Tensor, keys: int) -> bool:
    """Checks that positions lie in `[-1, S)`, so that nothing outside a tensor is ever read.

    Returns:
        Whether some position is `-1`.

    Raises:
        ValueError: A position outside.
    """
    if not indices.numel():
        return False
    lowest, highest = (int(value) for value in torch.stack(indices.aminmax()).tolist())
    if lowest < -1 or highest >= keys:
        raise ValueError(
            f"{op}: indices must lie in [-1, S) = [-1, {keys}), got values from {lowest} to {highest}; "
            "use -1 for places to skip"
        )
    return lowest < 0
