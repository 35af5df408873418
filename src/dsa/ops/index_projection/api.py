"""What an indexer makes of the hidden states of a few tokens. Semantics: README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa.ops import native_support, triton_support
from dsa.ops.blocks import full_precision
from dsa.ops.checks import check_tensor, describe
from dsa.ops.index_projection import reference
from dsa.ops.index_projection.types import IndexWeights, Rope
from dsa.ops.quantize.types import QuantizedKeys
from dsa.ops.types import Impl, resolve_impl

_OP = "index_projection"

FEW_TOKENS = 8
"""`B * T` up to which `auto` takes the compiled kernel on a CPU: with more, torch's matrix products are ahead."""


def index_projection(
    hidden: Tensor,
    weights: IndexWeights,
    rope: Rope | None,
    out: Tensor | QuantizedKeys,
    begin: int = 0,
    *,
    queries: bool = True,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor] | None:
    """Projects hidden states to index keys, normalises, rotates and stores them; and to queries and head weights.

    No gradient passes. Meant for decoding: a prompt's matrix products are torch's business.

    Shapes: `B` batch, `T` tokens, `C` hidden size, `Hi`/`Di` index heads / index head dim, `R` rotated dims.

    Args:
        hidden: `[B, T, C]`.
        weights: The indexer's.
        rope: Tables for these tokens' positions, each `[B or 1, T, R]`; `None` for layers without RoPE.
        out: Where the keys go: `QuantizedKeys` or fp32, `[B, capacity, Di]`; a cache's storage.
        begin: The place of the first token there.
        queries: Whether queries and head weights are wanted.
        impl: Which implementation runs; an explicit choice never falls back.

    Returns:
        Index queries `[B, T, Hi, Di]` and fp32 head weights `[B, T, Hi]`, which carry the factor `Hi**-0.5`; or
        `None` where no queries are wanted.

    Raises:
        TypeError: `hidden` is not a floating-point tensor.
        ValueError: Shapes that do not fit together.
        NotImplementedError: The implementation asked for cannot run this input.
    """
    batch, tokens = _check(hidden, weights, rope, out, begin)
    if impl == "auto" and batch * tokens > FEW_TOKENS and hidden.is_cpu:
        impl = "reference"
    addresses, gap = None, None
    if hidden.is_cpu and impl in ("auto", "native"):
        addresses = weights.addresses()
        gap = "the kernel takes weights that are fp32 and dense" if addresses is None else None
    gap = gap or _native_gap(hidden, rope, out)
    chosen = "native"
    if impl != "auto" or gap is not None:
        gaps = triton_support.with_triton({"native": gap, "reference": None}, hidden, *weights.tensors, *(rope or ()))
        chosen = resolve_impl(_OP, impl, gaps)
    if chosen == "triton":
        from dsa.ops.index_projection import triton

        with torch.no_grad():
            return triton.index_projection(hidden, weights, rope, out, begin, queries=queries)
    if chosen == "native":
        from dsa.ops.index_projection import native

        assert addresses is not None
        return native.index_projection(hidden, weights, addresses, rope, out, begin, queries=queries)
    with torch.no_grad(), full_precision(hidden.device):
        return reference.index_projection(hidden, weights, rope, out, begin, queries=queries)


def _check(
    hidden: Tensor, weights: IndexWeights, rope: Rope | None, out: Tensor | QuantizedKeys, begin: int
) -> tuple[int, int]:
    """Returns `B` and `T`."""
    check_tensor(_OP, "hidden", hidden, "[B, T, C]", (None, None, weights.width))
    batch, tokens, _ = hidden.shape
    dim = weights.dim
    if rope is not None:
        cos, sin = rope
        rope_batch, rope_tokens, rotated = cos.shape
        fits = rope_batch in (1, batch) and rope_tokens == tokens and rotated % 2 == 0 and rotated <= dim
        if not fits or cos.shape != sin.shape:
            raise ValueError(
                f"{_OP}: rope must be two tables [{batch} or 1, {tokens}, R], R even and at most {dim}, "
                f"got {describe(cos)} and {describe(sin)}; make them with rope_tables"
            )
    data = out.data if isinstance(out, QuantizedKeys) else out
    out_batch, capacity, out_dim = data.shape
    fits = (out_batch, out_dim) == (batch, dim) and data.dtype in (torch.int8, torch.float8_e4m3fn, torch.float32)
    if not fits or not 0 <= begin <= capacity - tokens:
        raise ValueError(
            f"{_OP}: out must be QuantizedKeys or fp32, [{batch}, at least {begin} + {tokens}, {dim}], "
            f"got {describe(data)} and begin={begin}"
        )
    return batch, tokens


def _native_gap(hidden: Tensor, rope: Rope | None, out: Tensor | QuantizedKeys) -> str | None:
    """Why the compiled kernel cannot take these arguments, or `None` where it can."""
    for table in rope or ():
        if table.dtype != torch.float32 or not table.is_contiguous():
            return "the kernel takes tables that are fp32 and dense"
    data = out.data if isinstance(out, QuantizedKeys) else out
    if data.dtype == torch.float8_e4m3fn:
        return "the kernel writes index keys in int8 or fp32"
    if hidden.dtype != torch.float32:
        return f"the kernel takes fp32, got {hidden.dtype}"
    for name, x in (("hidden", hidden), ("out", data)):
        # The stride of numbers that have no neighbours may be anything.
        if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
            return f"the kernel takes rows in one piece, and {name} has strides {list(x.stride())}"
    return native_support.gap(hidden)
