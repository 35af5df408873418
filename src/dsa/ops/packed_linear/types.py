"""The block formats, and a weight in one of them.

Shapes: `N` rows (features out), `C` columns (features in), `P = ceil(N / 16)` panels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa.ops.checks import describe

PANEL_ROWS = 16
BLOCK_COLUMNS = 32
SUPER_COLUMNS = 256


class BlockFormat(NamedTuple):
    """How a block of weights is written; GGUF's formats under GGUF's names.

    Args:
        name: Such as `Q4_K`.
        number: In ggml's `enum ggml_type`.
        bits: Of a quant.
        zero: The quant that means zero, where there is no minimum.
        minimum: Whether every block has a smallest value of its own.
        super: Whether scales and minima are integers, to be multiplied with those of 256 columns.
        parts: How many scales 32 columns have.
        file_bytes: Of a block in a GGUF file: 32 columns, or 256 with `super`.
    """

    name: str
    number: int
    bits: int
    zero: int
    minimum: bool
    super: bool
    parts: int
    file_bytes: int

    @property
    def columns(self) -> int:
        """Columns of a block in a file; a row has a whole number of blocks."""
        return SUPER_COLUMNS if self.super else BLOCK_COLUMNS

    @property
    def block_bytes(self) -> int:
        """Of 32 columns of 16 rows in a panel, without what 256 columns share."""
        scale = PANEL_ROWS * (1 if self.super else 2)
        return PANEL_ROWS * BLOCK_COLUMNS * self.bits // 8 + (self.parts + self.minimum) * scale

    def panel_bytes(self, columns: int) -> int:
        """Of 16 rows."""
        shared = columns // SUPER_COLUMNS * PANEL_ROWS * 2 * (1 + self.minimum) if self.super else 0
        return -(-columns // BLOCK_COLUMNS) * self.block_bytes + shared

    def row_bytes(self, columns: int) -> int:
        """Of a row in a file."""
        return columns // self.columns * self.file_bytes


FORMATS = {
    made.name: made
    for made in (
        BlockFormat("Q4_0", 2, 4, 8, False, False, 1, 18),
        BlockFormat("Q4_1", 3, 4, 0, True, False, 1, 20),
        BlockFormat("Q5_0", 6, 5, 16, False, False, 1, 22),
        BlockFormat("Q5_1", 7, 5, 0, True, False, 1, 24),
        BlockFormat("Q8_0", 8, 8, 128, False, False, 1, 34),
        BlockFormat("Q4_K", 12, 4, 0, True, True, 1, 144),
        BlockFormat("Q5_K", 13, 5, 0, True, True, 1, 176),
        BlockFormat("Q6_K", 14, 6, 32, False, True, 2, 210),
    )
}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A matrix `[N, C]` in blocks, in the order in which the kernel reads them.

    Args:
        panels: uint8 `[P, bytes of a panel]`, dense; `README.md` has the layout.
        format: One of `FORMATS`.
        rows: `N`.
        columns: `C`.

    Raises:
        ValueError: `panels` is not of the size that the others say.
    """

    panels: Tensor
    format: BlockFormat
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.format.super and self.columns % SUPER_COLUMNS:
            raise ValueError(
                f"PackedWeight: columns must be a multiple of {SUPER_COLUMNS} for {self.format.name}, "
                f"got {self.columns}; use a format with blocks of {BLOCK_COLUMNS}"
            )
        shape = (-(-self.rows // PANEL_ROWS), self.format.panel_bytes(self.columns))
        if self.panels.dtype != torch.uint8 or self.panels.shape != shape or not self.panels.is_contiguous():
            raise ValueError(
                f"PackedWeight: panels must be uint8 {list(shape)} and dense for {self.rows} x {self.columns} weights "
                f"in {self.format.name}, got {describe(self.panels)}"
            )

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return self.panels.nbytes
