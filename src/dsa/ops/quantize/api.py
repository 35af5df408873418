"""Index keys and queries in eight bits. Semantics: README.md."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dsa.ops import native_support, triton_support
from dsa.ops.blocks import full_precision
from dsa.ops.checks import check_tensor
from dsa.ops.quantize import reference
from dsa.ops.quantize.types import QuantizedKeys
from dsa.ops.types import Impl, resolve_impl

_REFERENCES = {"int8": reference.quantize_keys_int8, "fp8": reference.quantize_keys_fp8}


def quantize_index_keys(
    k: Tensor,
    dtype: Literal["int8", "fp8"] = "int8",
    *,
    power_of_two: bool = False,
    out: QuantizedKeys | None = None,
    impl: Impl = "auto",
) -> QuantizedKeys:
    """Rotates index keys, where `Di` is a power of two, and rounds them to eight bits with one scale a token.

    Args:
        k: Index keys `[B, S, Di]`; converted to fp32 first. No gradient passes.
        dtype: `"int8"`: `scale = max|k| / 127`, round half to even. `"fp8"`: e4m3, `scale = max|k| / 448`.
            A zero row has scale 1. A row with NaN or infinity has scale NaN and zeros as data.
        power_of_two: Round each scale up to a power of two, as caches do that keep no more than its exponent (ue8m0).
        out: Where to write in place of new tensors: the next tokens of a preallocated cache, `cache[:, a:b]`.
        impl: Which implementation runs; an explicit choice never falls back. All give the same bytes.

    Returns:
        The keys: `out`, where given.

    Raises:
        TypeError: `k` is not a floating-point tensor.
        ValueError: `k` is not `[B, S, Di]`, `Di` is 0, an unknown dtype, or `out` of another shape, dtype or device.
        NotImplementedError: The implementation asked for cannot run this input.
    """
    op = "quantize_index_keys"
    check_tensor(op, "k", k, "[B, S, Di]", (None, None, None))
    if k.shape[-1] == 0:
        raise ValueError(f"{op}: k must have at least one dim per key, got {list(k.shape)}")
    if dtype not in ("int8", "fp8"):
        raise ValueError(f"{op}: dtype must be 'int8' or 'fp8', got {dtype!r}")
    if out is not None and (out.shape, out.dtype, out.device) != (k.shape, dtype, k.device):
        raise ValueError(
            f"{op}: out must be {dtype} {list(k.shape)} on {k.device} like the keys, "
            f"got {out.dtype} {list(out.shape)} on {out.device}; slice it"
        )
    native_gap = native_support.gap(k) if dtype == "int8" else "the CPU kernels keep index keys in int8 or fp32"
    gaps = triton_support.with_triton({"native": native_gap, "reference": None}, k)
    if power_of_two:
        gaps["native"] = "the CPU kernels do not round scales to powers of two"
    chosen = resolve_impl(op, impl, gaps)
    if chosen == "triton":
        from dsa.ops.quantize import triton

        return triton.quantize_keys(k, dtype, power_of_two, out)
    if chosen == "native":
        from dsa.ops.quantize import native

        return native.quantize_keys_int8(k.detach(), out)
    with torch.no_grad(), full_precision(k.device):
        keys = _REFERENCES[dtype](k, power_of_two)
    if out is None:
        return keys
    out.data.copy_(keys.data)
    out.scale.copy_(keys.scale)
    return out


def quantize_index_queries(q: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates index queries like int8 keys and rounds them to `[-63, 63]` with one scale per token and head.

    The range leaves room for kernels that multiply unsigned by signed bytes in pairs without saturating.

    Args:
        q: Index queries `[B, T, Hi, Di]`; converted to fp32 first. No gradient passes.

    Returns:
        data: int8 `[B, T, Hi, Di]`.
        scale: fp32 `[B, T, Hi]`, with the rules of `quantize_index_keys`.

    Raises:
        TypeError: `q` is not a floating-point tensor.
        ValueError: `q` is not `[B, T, Hi, Di]`, or `Di` is 0.
    """
    op = "quantize_index_queries"
    check_tensor(op, "q", q, "[B, T, Hi, Di]", (None, None, None, None))
    if q.shape[-1] == 0:
        raise ValueError(f"{op}: q must have at least one dim per head, got {list(q.shape)}")
    with torch.no_grad(), full_precision(q.device):
        return reference.quantize_queries_int8(q)
