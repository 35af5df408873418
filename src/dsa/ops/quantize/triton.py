"""Index keys and queries to eight bits on GPUs: rotation, scale, rounding and store in one kernel.

Bit-identical with `reference.py` on a CPU for both dtypes: the same additions in the same order, IEEE divisions,
and rounding to e4m3 by integer arithmetic, so that GPUs without that type (before SM89) write the same bytes.
Every row is read once and written once.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa.ops.quantize.types import QuantizedKeys
from dsa.ops.triton_support import on

_KEY_LEVELS = 127.0
_QUERY_LEVELS = 63.0
_FP8_LARGEST = 448.0
_ROWS_PER_PROGRAM = 32

# Adding and taking away 1.5 * 2**23 rounds a small fp32 number to an integer, half to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def hadamard(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Sums and differences of `x[ROWS, SIZE]` at distances 1, 2, 4, ...; without the factor `SIZE**-0.5`."""
    for stage in tl.static_range(SIZE.bit_length() - 1):
        pairs = tl.reshape(x, [ROWS, SIZE >> (stage + 1), 2, 1 << stage])
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        mixed = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
        x = tl.reshape(mixed, [ROWS, SIZE])
    return x


@triton.jit
def encode_e4m3(x):
    """Bytes of e4m3 numbers, half to even, from fp32 numbers in `[-448, 448]`."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # 20 bits of the mantissa go, and 120 is the difference of the two exponent biases.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 the numbers are multiples of 2**-9.
    subnormal = ((tl.abs(x) * 512.0 + _ROUNDER) - _ROUNDER).to(tl.int32)
    code = tl.where(size >= 0x3C800000, normal, subnormal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def scale_of(x, levels, ROWS: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """What `x[ROWS, n]` is divided by to lie in `[-levels, levels]`: 1 for zeros, NaN for a row that is not finite."""
    size = tl.abs(x)
    finite = size < float("inf")
    broken = tl.max(tl.where(finite, 0, 1), axis=1) > 0
    scale = tl.div_rn(tl.max(tl.where(finite, size, 0.0), axis=1), tl.zeros([ROWS], tl.float32) + levels)
    if POWER_OF_TWO:
        scale = _next_power_of_two(scale)
    scale = tl.where(scale == 0.0, 1.0, scale)
    return tl.where(broken, float("nan"), scale)


@triton.jit
def _next_power_of_two(x):
    """The least power of two that is not below `x`, and 0 for 0; `x` is not negative."""
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFFF) & 0x7F800000
    # Below 2**-126 the bits are the number itself in units of 2**-149: their own next power of two is wanted.
    units = bits.to(tl.float32).to(tl.int32, bitcast=True)
    subnormal = ((units + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True).to(tl.int32)
    return tl.where(bits < 0x800000, subnormal, normal).to(tl.float32, bitcast=True)


@triton.jit
def levels_of(x, scale, levels, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """`x[ROWS, SIZE]` divided by its scales, not yet rounded; zeros in rows that are not finite."""
    level = tl.div_rn(x, tl.broadcast_to(scale[:, None], [ROWS, SIZE]))
    level = tl.where((scale != scale)[:, None], 0.0, level)
    return tl.minimum(tl.maximum(level, -levels), levels)


@triton.jit
def encode(level, FP8: tl.constexpr):
    """Bytes of e4m3 or int8 numbers, half to even; clamped before, the limits are whole numbers."""
    if FP8:
        return encode_e4m3(level)
    else:
        return ((level + _ROUNDER) - _ROUNDER).to(tl.int8)


@triton.jit
def _quantize_kernel(
    x_ptr,
    weight_ptr,
    data_ptr,
    scale_ptr,
    coefficient_ptr,
    rows,
    middle,
    inner,
    x_strides,
    weight_strides,
    data_strides,
    scale_strides,
    normalizer,
    levels,
    factor,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
    FP8: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Rows of `x[outer, middle, inner, DIM]`; `coefficient = (weight * scale) * factor` where `WEIGHTED`."""
    stride_xa, stride_xb, stride_xc, stride_xd = x_strides
    stride_wa, stride_wb, stride_wc = weight_strides
    stride_da, stride_db, stride_dc, stride_dd = data_strides
    stride_sa, stride_sb, stride_sc = scale_strides
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = row < rows
    c = (row % inner).to(tl.int64)
    b = (row // inner % middle).to(tl.int64)
    a = (row // inner // middle).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    inside = present[:, None] & (dim < DIM)[None, :]
    source = (a * stride_xa + b * stride_xb + c * stride_xc)[:, None] + (dim * stride_xd)[None, :]
    x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:
        x = hadamard(x, BLOCK_ROWS, BLOCK_D) * normalizer

    scale = scale_of(x, levels, BLOCK_ROWS, POWER_OF_TWO)
    level = levels_of(x, scale, levels, BLOCK_ROWS, BLOCK_D)
    target = (a * stride_da + b * stride_db + c * stride_dc)[:, None] + (dim * stride_dd)[None, :]
    tl.store(data_ptr + target, encode(level, FP8), mask=inside)
    place = a * stride_sa + b * stride_sb + c * stride_sc
    if WEIGHTED:
        weight = tl.load(weight_ptr + a * stride_wa + b * stride_wb + c * stride_wc, mask=present, other=0.0)
        tl.store(coefficient_ptr + place, (weight.to(tl.float32) * scale) * factor, mask=present)
    else:
        tl.store(scale_ptr + place, scale, mask=present)


def quantize_keys(k: Tensor, dtype: str, power_of_two: bool = False, out: QuantizedKeys | None = None) -> QuantizedKeys:
    """`[B, S, Di]` to int8 or e4m3, as `reference.quantize_keys_int8` and `reference.quantize_keys_fp8`.

    Args:
        k: Any floating dtype up to fp32, any strides.
        dtype: `"int8"` or `"fp8"`.
        power_of_two: Round each scale up to a power of two.
        out: Where to write, of this shape and dtype, such as the next tokens of a cache. `None` allocates.
    """
    batch, tokens, dim = k.shape
    if out is None:
        data_dtype = torch.float8_e4m3fn if dtype == "fp8" else torch.int8
        out = QuantizedKeys(
            torch.empty(batch, tokens, dim, dtype=data_dtype, device=k.device),
            torch.empty(batch, tokens, dtype=torch.float32, device=k.device),
        )
    _write_keys(k.detach(), out.data.view(torch.uint8) if dtype == "fp8" else out.data, out.scale, power_of_two)
    return out


@torch.library.custom_op("dsa::quantize_index_keys_triton", mutates_args=("data", "scale"))
def _write_keys(k: Tensor, data: Tensor, scale: Tensor, power_of_two: bool) -> None:
    """One operator to `torch.compile`; fp8 as uint8."""
    levels = _FP8_LARGEST if data.dtype == torch.uint8 else _KEY_LEVELS
    _launch(k.unsqueeze(2), None, data.unsqueeze(2), scale.unsqueeze(2), levels, 1.0, power_of_two)


@_write_keys.register_fake
def _(k: Tensor, data: Tensor, scale: Tensor, power_of_two: bool) -> None:
    return None


def quantize_weighted_queries(q: Tensor, w: Tensor, factor: float, dtype: str) -> tuple[Tensor, Tensor]:
    """Index queries in eight bits, and what their dot products are multiplied by.

    Args:
        q: `[B, T, Hi, Di]`, any strides.
        w: Head weights `[B, T, Hi]`, any strides.
        factor: Scale of the scores.
        dtype: Of the keys: int8 queries lie in `[-63, 63]`, fp8 ones in `[-448, 448]`.

    Returns:
        data: int8 or uint8 (bytes of e4m3) `[B, Hi, T, Di]`.
        coefficient: fp32 `[B, Hi, T]`: `(w * query_scale) * factor`.
    """
    batch, tokens, heads, dim = q.shape
    data_dtype = torch.uint8 if dtype == "fp8" else torch.int8
    data = torch.empty(batch, heads, tokens, dim, dtype=data_dtype, device=q.device)
    coefficient = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    levels = _FP8_LARGEST if dtype == "fp8" else _QUERY_LEVELS
    _launch(q, w, data.transpose(1, 2), coefficient.transpose(1, 2), levels, factor)
    return data, coefficient


def _launch(
    x: Tensor, weight: Tensor | None, data: Tensor, scale: Tensor, levels: float, factor: float,
    power_of_two: bool = False,
) -> None:  # fmt: skip
    """Runs the kernel over all rows of `x[a, b, c, Di]`; `scale` receives the coefficients if there are weights."""
    rows, dim = x.shape[:-1].numel(), x.shape[-1]
    if rows == 0:
        return
    rotate = dim & (dim - 1) == 0
    weights = scale if weight is None else weight
    with on(x.device):
        _quantize_kernel[(triton.cdiv(rows, _ROWS_PER_PROGRAM),)](
            x, weights, data, scale, scale, rows, *x.shape[1:3],
            x.stride(), weights.stride(), data.stride(), scale.stride(), dim**-0.5, levels, factor,
            DIM=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_ROWS=_ROWS_PER_PROGRAM,
            ROTATE=rotate, FP8=data.dtype == torch.uint8, POWER_OF_TWO=power_of_two, WEIGHTED=weight is not None,
            num_warps=4,
        )  # fmt: skip
