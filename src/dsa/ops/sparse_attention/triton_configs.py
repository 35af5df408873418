"""Tiles of the Triton kernels of `sparse_attention`: which there are, which fit a device, and how selections are cut.

Shapes: `D`/`Dv` head dims of keys / values, `K` selected tokens.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dsa.ops.triton_support import Config, fitting, processors
from dsa.ops.triton_tiles import padded_width, product_dtype, split_width

_MOST_SPLITS = 64

# Best guesses first. Tiles of 64 heads fill the matrix units of SM90; fewer heads leave room for more loads in flight.
_MANY_HEADS = (
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 32, "STAGES": 3, "num_warps": 8},
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 64, "STAGES": 2, "num_warps": 8},
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 32, "STAGES": 4, "num_warps": 8},
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 16, "STAGES": 2, "num_warps": 8},
    {"BLOCK_HEADS": 32, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 8},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 2, "num_warps": 4},
)
_FEW_HEADS = (
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 64, "STAGES": 3, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 4, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 128, "STAGES": 2, "num_warps": 8},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 2},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 2, "num_warps": 4},
)
_BACKWARD = (
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 64, "STAGES": 1, "num_warps": 8},
    {"BLOCK_HEADS": 32, "BLOCK_KEYS": 64, "STAGES": 1, "num_warps": 8},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 64, "STAGES": 2, "num_warps": 8},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 3, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 4},
)
_UNION = (
    {"BLOCK_KEYS": 64, "STAGES": 3, "num_warps": 4},
    {"BLOCK_KEYS": 128, "STAGES": 2, "num_warps": 4},
    {"BLOCK_KEYS": 64, "STAGES": 2, "num_warps": 4},
    {"BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 4},
)
# Three tf32 products each, whose operands take registers instead of shared memory.
_FLOAT32 = (
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 2, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 4},
)
# The backward pass keeps more tiles, and three products of each would not fit: it multiplies fp32 without matrix units.
_BACKWARD_FLOAT32 = ({"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 8},)


def split_count(programs: int, selected: int, block_keys: int, device: torch.device) -> int:
    """Into how many parts a selection is cut so that about four programs run on every multiprocessor."""
    if device.type != "cuda":
        return 1
    available = processors(device.index or 0)
    if programs >= 2 * available:
        return 1
    return max(1, min(triton.cdiv(selected, block_keys), triton.cdiv(4 * available, programs), _MOST_SPLITS))


def values_in_keys(k: Tensor, v: Tensor, widest: int) -> bool:
    """Whether `v` is a view of the first columns of `k` and covers whole parts, so that its tiles are those of `k`."""
    if v.data_ptr() != k.data_ptr() or v.dtype != k.dtype or v.stride() != k.stride():
        return False
    _, widths = split_width(v.shape[-1], widest)
    return sum(widths) == v.shape[-1] and split_width(k.shape[-1], widest)[1][: len(widths)] == widths


def forward_candidates(q: Tensor, k: Tensor, v: Tensor) -> list[Config]:
    """Those whose queries, gathered rows in flight and probabilities fit shared memory."""
    itemsize = product_dtype(q, k, v).itemsize
    columns, gathered = padded_width(q.shape[-1]), _gathered_width(k, v)

    def bytes_of(config: Config) -> int:
        rows, places = config["BLOCK_HEADS"], config["BLOCK_KEYS"]
        return itemsize * (rows * (columns + places) + config["STAGES"] * places * gathered)

    if itemsize == 4:
        return fitting(_FLOAT32, bytes_of, q.device)
    return fitting(_FEW_HEADS if q.shape[2] // k.shape[2] <= 16 else _MANY_HEADS, bytes_of, q.device)


def backward_candidates(q: Tensor, k: Tensor, v: Tensor) -> list[Config]:
    """Those whose queries, upstream gradients, gathered rows and probabilities fit shared memory."""
    itemsize = product_dtype(q, k, v).itemsize
    columns, gathered = padded_width(q.shape[-1]) + padded_width(v.shape[-1]), _gathered_width(k, v)
    most_heads = max(16, triton.next_power_of_2(q.shape[2] // k.shape[2]))

    def bytes_of(config: Config) -> int:
        rows, places = config["BLOCK_HEADS"], config["BLOCK_KEYS"]
        # SM90's matrix unit takes sides of 64. Where only some products have them, the tiles are kept in two layouts.
        copies = 2 if (rows >= 64) != (places >= 64) else 1
        flying = config["STAGES"] if max(rows, places) >= 64 else max(1, config["STAGES"] - 1)
        return itemsize * (copies * rows * columns + flying * places * gathered + 64 * 64)

    if itemsize == 4:
        return fitting(_BACKWARD_FLOAT32, bytes_of, q.device)
    return fitting([c for c in _BACKWARD if c["BLOCK_HEADS"] <= most_heads], bytes_of, q.device)


def union_candidates(q: Tensor, k: Tensor, v: Tensor, rows: int) -> list[Config]:
    """Those whose queries, gathered rows in flight and probabilities fit shared memory."""
    itemsize, columns = product_dtype(q, k, v).itemsize, padded_width(q.shape[-1])
    gathered = columns + padded_width(v.shape[-1])

    def bytes_of(config: Config) -> int:
        places = config["BLOCK_KEYS"]
        return itemsize * (rows * (columns + places) + config["STAGES"] * places * gathered)

    return fitting(_UNION, bytes_of, q.device)


def _gathered_width(k: Tensor, v: Tensor) -> int:
    """Columns read for every selected token."""
    return padded_width(k.shape[-1]) + (0 if values_in_keys(k, v, 512) else padded_width(v.shape[-1]))


def shape_key(q: Tensor, k: Tensor, v: Tensor) -> tuple[object, ...]:
    return str(product_dtype(q, k, v)), q.shape[-1], v.shape[-1], values_in_keys(k, v, 512)
