"""Building blocks of the Triton kernels: rows of any width as a tuple of tiles, and products over them.

Triton's tiles have power-of-two sides. A head dim such as 576 or 80 is therefore cut into *parts* (512 + 64, 64 + 16),
given to a kernel as two tuples of constants, offsets and widths; `split_width` makes them.
"""

# A kernel has no types to annotate, and grows its tuples of tiles by the one form that Triton compiles.
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

TILE_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Parts = tuple[tuple[int, ...], tuple[int, ...]]


def split_width(size: int, widest: int) -> Parts:
    """Offsets and widths of power-of-two parts, at least 16 wide, that cover `size` columns.

    The matrix units take no fewer than 16 columns, so the last part may reach past `size`; loads mask it.

    >>> split_width(576, 512)
    ((0, 512), (512, 64))
    >>> split_width(40, 128)
    ((0, 32), (32, 16))
    """
    offsets, widths = [], []
    done = 0
    while done < size:
        left = size - done
        whole = max(16, triton.next_power_of_2(left))
        # A part with little padding costs less than several exact ones.
        width = whole if whole <= max(16, left + left // 7) else whole // 2
        width = min(width, widest)
        offsets.append(done)
        widths.append(width)
        done += width
    return tuple(offsets), tuple(widths)


def padded_width(size: int) -> int:
    """Columns of all parts together."""
    return sum(split_width(size, 512)[1])


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """In which dtype rows are multiplied: their own where all have the same, else fp32."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def precision(dtype: torch.dtype) -> str:
    """How matrix units multiply: fp32 as three tf32 products, which keep 21 of its 24 bits."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`a @ b + acc` in fp32."""
    if INTERPRETED:
        # The interpreter holds bf16 as bit patterns and would multiply those.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_parts(
    rows,
    valid,
    stride,
    SIZE: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Rows `[n, SIZE]` at the pointers `rows[n]` as a tuple of tiles; zeros where not valid."""
    parts = ()
    for i in tl.static_range(len(WIDTHS)):
        columns = OFFSETS[i] + tl.arange(0, WIDTHS[i])
        mask = valid[:, None]
        if OFFSETS[i] + WIDTHS[i] > SIZE:
            mask = mask & (columns < SIZE)[None, :]
        tile = tl.load(rows[:, None] + columns[None, :] * stride, mask=mask, other=0.0)
        parts = parts + (tile.to(DTYPE),)
    return parts


@triton.jit
def store_part(rows, valid, tile, SIZE: tl.constexpr, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    """Writes one part of contiguous rows."""
    columns = OFFSET + tl.arange(0, WIDTH)
    mask = valid[:, None]
    if OFFSET + WIDTH > SIZE:
        mask = mask & (columns < SIZE)[None, :]
    tl.store(rows[:, None] + columns[None, :], tile.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def add_part(rows, valid, tile, SIZE: tl.constexpr, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    """Adds one part to contiguous fp32 rows that other programs add to as well."""
    columns = OFFSET + tl.arange(0, WIDTH)
    mask = valid[:, None]
    if OFFSET + WIDTH > SIZE:
        mask = mask & (columns < SIZE)[None, :]
    tl.atomic_add(rows[:, None] + columns[None, :], tile, mask=mask, sem="relaxed")


@triton.jit
def zero_parts(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """Accumulators for rows cut into parts."""
    parts = ()
    for i in tl.static_range(len(WIDTHS)):
        parts = parts + (tl.full([ROWS, WIDTHS[i]], 0.0, tl.float32),)
    return parts


@triton.jit
def dot_rows(a, b, factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """`factor * a @ b^T` over the first `PARTS` parts: fp32 `[ROWS, COLUMNS]`.

    The parts' products are scaled one by one and then added. One accumulator handed from product to product would make
    the compiler give each warp whole rows, so that on SM90 two warp groups compute the same 64 rows twice.
    """
    product = dot(a[0], tl.trans(b[0]), tl.full([ROWS, COLUMNS], 0.0, tl.float32), PRECISION) * factor
    for i in tl.static_range(1, PARTS):
        product += dot(a[i], tl.trans(b[i]), tl.full([ROWS, COLUMNS], 0.0, tl.float32), PRECISION) * factor
    return product


@triton.jit
def decode_e4m3(code):
    """fp16 numbers from bytes of e4m3, divided by 256 (the difference of the exponent biases); NaN is 1.875."""
    code = code.to(tl.int16)
    return (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def tanh(x):
    """Through `exp2`; the absolute error is that of fp32 at 1."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -size, size)


@triton.jit
def finite_or_zero(x):
    """Replaces `-inf`, the maximum of nothing, by 0 so that differences with it are numbers."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def count_used(indices, stride, begin, end, keys, BLOCK: tl.constexpr):
    """One past the last place in `[begin, end)` that names a key, so that padding costs no tiles."""
    used = begin
    for start in tl.range(begin, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        index = tl.load(indices + places * stride, mask=places < end, other=-1)
        used = tl.maximum(used, tl.max(tl.where((index >= 0) & (index < keys), places + 1, 0), axis=0))
    return used
