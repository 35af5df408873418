"""Weights into panels: blocks as a GGUF file has them, and numbers.

Shapes: `N` rows, `C` columns, `P` panels of 16 rows, `B` blocks of 32 columns in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsa.ops.checks import check_tensor, describe
from dsa.ops.packed_linear.types import BLOCK_COLUMNS, FORMATS, PANEL_ROWS, SUPER_COLUMNS, BlockFormat, PackedWeight

_WEIGHTS_AT_A_TIME = 1 << 22
"""Taken apart together, so that what lies between stays small."""

_LARGEST = 65504.0


@dataclass
class Fields:
    """Blocks taken apart.

    Args:
        quants: uint8 `[N, C]`, without sign.
        scale: fp16 `[N, B]`; in formats with superblocks bytes `[N, B * parts]`.
        minimum: The same for minima; `None` in formats without.
        super_scale: fp16 `[N, C / 256]` in formats with superblocks.
        super_minimum: The same.
    """

    quants: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    super_scale: Tensor | None = None
    super_minimum: Tensor | None = None


def pack_blocks(blocks: Tensor, format: BlockFormat, columns: int) -> PackedWeight:
    """Blocks of a GGUF file, every bit of them kept.

    Args:
        blocks: uint8 `[N, bytes of a row]`.
        format: What they are.
        columns: `C`, a multiple of the columns of a block.

    Raises:
        ValueError: The bytes are not those of whole rows.
    """
    if columns % format.columns or blocks.dtype != torch.uint8 or blocks.ndim != 2:
        raise ValueError(
            f"pack_blocks: blocks must be uint8 [N, bytes of a row] with columns a multiple of {format.columns} for "
            f"{format.name}, got {describe(blocks)} and columns={columns}"
        )
    if blocks.shape[1] != format.row_bytes(columns):
        raise ValueError(
            f"pack_blocks: {columns} columns in {format.name} are {format.row_bytes(columns)} bytes a row, "
            f"got {describe(blocks)}"
        )
    take_apart = _FROM_FILE[format.name]
    return _in_parts(blocks, format, columns, lambda rows: take_apart(rows.unflatten(1, (-1, format.file_bytes))))


def pack_weight(weight: Tensor, format: Literal["Q8_0", "Q4_1"]) -> PackedWeight:
    """Numbers into blocks: the nearest of 255 multiples of a scale, or of 16 steps from a block's least to its largest.

    Args:
        weight: `[N, C]`, floating-point, any width.
        format: `Q8_0`, or `Q4_1`.

    Raises:
        ValueError: A format that numbers are not packed into, or numbers that are not finite or beyond fp16.
    """
    check_tensor("pack_weight", "weight", weight, "[N, C]", (None, None))
    if format not in _FROM_NUMBERS:
        raise ValueError(f"pack_weight: format must be one of {', '.join(_FROM_NUMBERS)}, got {format!r}")
    weight, columns = weight.detach(), weight.shape[1]
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if not largest <= _LARGEST:
        raise ValueError(
            f"pack_weight: weight must have finite numbers of at most {_LARGEST:g}, got {largest:g}; leave this layer "
            "as it is"
        )
    take_apart = _FROM_NUMBERS[format]
    padding = -columns % BLOCK_COLUMNS

    def fields(rows: Tensor) -> Fields:
        # The last number again, so that what fills the block has no part in its range.
        filled = torch.cat((rows, rows[:, -1:].expand(-1, padding)), 1) if padding and columns else rows
        return take_apart(filled.float().unflatten(1, (-1, BLOCK_COLUMNS)))

    return _in_parts(weight, FORMATS[format], columns, fields)


def _in_parts(source: Tensor, format: BlockFormat, columns: int, fields: Callable[[Tensor], Fields]) -> PackedWeight:
    rows = len(source)
    made = torch.empty(-(-rows // PANEL_ROWS), format.panel_bytes(columns), dtype=torch.uint8)
    together = max(1, _WEIGHTS_AT_A_TIME // max(1, columns * PANEL_ROWS))
    for first in range(0, len(made), together):
        part = fields(source[first * PANEL_ROWS : (first + together) * PANEL_ROWS])
        made[first : first + together] = to_panels(part, format)
    return PackedWeight(made, format, rows, columns)


def to_panels(fields: Fields, format: BlockFormat) -> Tensor:
    """uint8 `[P, bytes of a panel]`."""
    quants = _by_panel(fields.quants)
    panels, _, columns = quants.shape
    blocks = columns // BLOCK_COLUMNS
    # [P, B, word, row, column of the word]
    words = quants.reshape(panels, PANEL_ROWS, blocks, 8, 4).permute(0, 2, 3, 1, 4)
    parts = []
    if format.bits == 8:
        parts.append(words)
    else:
        low = words & 15
        parts.append(low[:, :, :4] | low[:, :, 4:] << 4)
        high = (words >> 4).contiguous()
        if format.bits == 5:
            parts.append(_eight_bits(high))
        if format.bits == 6:
            parts.append(torch.stack([_four_pairs(high[:, :, 4 * half : 4 * half + 4]) for half in (0, 1)], 2))
    parts += [_scales(x, blocks) for x in (fields.scale, fields.minimum) if x is not None]
    body = torch.cat([part.reshape(panels, blocks, -1) for part in parts], 2)
    if fields.super_scale is None:
        return body.flatten(1)
    supers = columns // SUPER_COLUMNS
    heads = [_scales(x, supers) for x in (fields.super_scale, fields.super_minimum) if x is not None]
    whole = [*(head.reshape(panels, supers, -1) for head in heads), body.reshape(panels, supers, -1)]
    return torch.cat(whole, 2).flatten(1)


def _eight_bits(high: Tensor) -> Tensor:
    return _four_pairs(torch.stack([high[:, :, 2 * word] | high[:, :, 2 * word + 1] << 1 for word in range(4)], 2))


def _four_pairs(high: Tensor) -> Tensor:
    return high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6


def _by_panel(x: Tensor) -> Tensor:
    """`[N, ...]` as `[P, 16, ...]`; rows that there are not are zeros."""
    missing = -len(x) % PANEL_ROWS
    if missing:
        x = torch.cat((x, x.new_zeros(missing, *x.shape[1:])))
    return x.unflatten(0, (-1, PANEL_ROWS))


def _scales(x: Tensor, blocks: int) -> Tensor:
    """`[N, blocks * parts]` as bytes `[P, blocks, parts, 16 rows]`."""
    return _by_panel(x).unflatten(2, (blocks, -1)).permute(0, 2, 3, 1).contiguous().view(torch.uint8)


def from_panels(panels: Tensor, format: BlockFormat, columns: int) -> Fields:
    """The inverse of `to_panels`, with all 16 rows of each panel and whole blocks."""
    count, blocks = len(panels), -(-columns // BLOCK_COLUMNS)
    body, fields = panels, Fields(panels, panels)
    if format.super:
        supers = columns // SUPER_COLUMNS
        body = panels.reshape(count, supers, -1)
        head = PANEL_ROWS * 2
        fields.super_scale = _unscaled(body[:, :, :head], torch.float16)
        if format.minimum:
            fields.super_minimum = _unscaled(body[:, :, head : 2 * head], torch.float16)
        body = body[:, :, head * (1 + format.minimum) :]
    body = body.reshape(count, blocks, format.block_bytes)
    words, at = _words(body, format)
    fields.quants = words.permute(0, 3, 1, 2, 4).reshape(count * PANEL_ROWS, blocks * BLOCK_COLUMNS)
    dtype = torch.uint8 if format.super else torch.float16
    size = PANEL_ROWS * dtype.itemsize
    fields.scale = _unscaled(body[:, :, at : at + format.parts * size], dtype)
    if format.minimum:
        fields.minimum = _unscaled(body[:, :, at + format.parts * size :], dtype)
    return fields


def _words(body: Tensor, format: BlockFormat) -> tuple[Tensor, int]:
    """Quants `[P, B, 8 words, 16 rows, 4]`, and where in a block they end."""
    size = PANEL_ROWS * 4
    if format.bits == 8:
        return body[:, :, : 8 * size].reshape(*body.shape[:2], 8, PANEL_ROWS, 4), 8 * size
    at = 4 * size
    both = body[:, :, :at].unflatten(2, (4, size))
    words = torch.cat((both & 15, both >> 4), 2)
    if format.bits == 5:
        high = body[:, :, at : at + size]
        words = words | torch.stack([(high >> word & 1) << 4 for word in range(8)], 2)
        at += size
    if format.bits == 6:
        halves = body[:, :, at : at + 2 * size].unflatten(2, (2, size))
        words = words | torch.stack([(halves[:, :, w // 4] >> 2 * (w % 4) & 3) << 4 for w in range(8)], 2)
        at += 2 * size
    return words.unflatten(3, (PANEL_ROWS, 4)), at


def _unscaled(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes `[P, blocks, parts * 16 rows]` as `[N, blocks * parts]`."""
    numbers = data.contiguous().view(dtype).unflatten(2, (-1, PANEL_ROWS))
    return numbers.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at a byte of each block."""
    return blocks[:, :, at : at + 2].contiguous().view(torch.float16)[:, :, 0]


def _bits(data: Tensor, count: int) -> Tensor:
    """`[N, B, bytes]` as single bits `[N, B, count]`, the lowest of a byte first."""
    return (data[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(2)[:, :, :count]


def _four(blocks: Tensor) -> Tensor:
    """Quants of 16 bytes: low halves first."""
    return torch.cat((blocks & 15, blocks >> 4), 2)


def _q4_0(blocks: Tensor) -> Fields:
    return Fields(_four(blocks[:, :, 2:]).flatten(1), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Fields:
    return Fields(_four(blocks[:, :, 4:]).flatten(1), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Tensor) -> Fields:
    quants = _four(blocks[:, :, 6:]) | _bits(blocks[:, :, 2:6], 32) << 4
    return Fields(quants.flatten(1), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Fields:
    quants = _four(blocks[:, :, 8:]) | _bits(blocks[:, :, 4:8], 32) << 4
    return Fields(quants.flatten(1), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Fields:
    return Fields((blocks[:, :, 2:] ^ 128).flatten(1), _half(blocks, 0))


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and minima that K formats keep in twelve bytes, `[N, superblocks * 8]` each."""
    first, second, third = packed[:, :, :4], packed[:, :, 4:8], packed[:, :, 8:12]
    scale = torch.cat((first & 63, third & 15 | first >> 6 << 4), 2)
    minimum = torch.cat((second & 63, third >> 4 | second >> 6 << 4), 2)
    return scale.flatten(1), minimum.flatten(1)


def _pairs_of_blocks(data: Tensor) -> Tensor:
    """Quants of 128 bytes, of which 32 hold two blocks each, `[N, superblocks, 8, 32]`."""
    each = data.unflatten(2, (4, 32))
    return torch.stack((each & 15, each >> 4), 3).flatten(2, 3)


def _q4_k(blocks: Tensor) -> Fields:
    scale, minimum = _six_bit_scales(blocks[:, :, 4:16])
    return Fields(_pairs_of_blocks(blocks[:, :, 16:]).flatten(1), scale, minimum, _half(blocks, 0), _half(blocks, 2))


def _q5_k(blocks: Tensor) -> Fields:
    scale, minimum = _six_bit_scales(blocks[:, :, 4:16])
    # Bit `b` of byte `i` is the fifth one of column `i` of block `b`.
    high = blocks[:, :, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    quants = _pairs_of_blocks(blocks[:, :, 48:]) | high << 4
    return Fields(quants.flatten(1), scale, minimum, _half(blocks, 0), _half(blocks, 2))


def _q6_k(blocks: Tensor) -> Fields:
    low = blocks[:, :, :128].unflatten(2, (2, 64))
    low = torch.cat((low & 15, low >> 4), 3)  # [N, superblocks, 2, 128]
    high = blocks[:, :, 128:192].unflatten(2, (2, 1, 32)) >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8) & 3
    return Fields((low | high.flatten(3) << 4).flatten(1), blocks[:, :, 192:208].flatten(1), None, _half(blocks, 208))


_FROM_FILE: dict[str, Callable[[Tensor], Fields]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""By format, what takes blocks `[N, blocks of a row, bytes]` apart."""


def _to_q8_0(blocks: Tensor) -> Fields:
    scale = (blocks.abs().amax(2, keepdim=True) / 127).half()
    quants = _divided(blocks, scale).round().clamp(-127, 127) + 128
    return Fields(quants.to(torch.uint8).flatten(1), scale.flatten(1))


def _to_q4_1(blocks: Tensor) -> Fields:
    minimum = blocks.amin(2, keepdim=True)
    scale = ((blocks.amax(2, keepdim=True) - minimum) / 15).half()
    minimum = minimum.half()
    quants = _divided(blocks - minimum.float(), scale).round().clamp(0, 15)
    return Fields(quants.to(torch.uint8).flatten(1), scale.flatten(1), minimum.flatten(1))


def _divided(numbers: Tensor, scale: Tensor) -> Tensor:
    """Zero where the scale is."""
    return torch.where(scale == 0, 0.0, numbers / scale.float())


_FROM_NUMBERS: dict[str, Callable[[Tensor], Fields]] = {"Q8_0": _to_q8_0, "Q4_1": _to_q4_1}
"""By format, what makes blocks of fp32 numbers `[N, B, 32]`."""
