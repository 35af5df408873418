"""Linear layers and embeddings whose weights stay in blocks, in place of torch's.

Shapes: `N` features out or tokens of a vocabulary, `C` features in or embedding dims.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from dsa.ops.packed_linear import FORMATS, PackedWeight, pack_weight, packed_linear, packed_rows
from dsa.ops.packed_linear.types import PANEL_ROWS

BF16 = "BF16"
"""A format next to the block formats: the numbers in bf16, multiplied by torch."""


class PackedMatrix(nn.Module):
    """A weight `[N, C]` in blocks: what the layers share.

    The bytes are a buffer, `blocks`, so they are saved and loaded under that name and no conversion of dtypes reaches
    them.

    Args:
        rows: `N`.
        columns: `C`.
        format: Name of a block format, or `BF16`.
        dtype: Of activations.
        shared: A layer whose bytes these are, too (tied weights); they are saved once, with that layer.
    """

    blocks: Tensor

    def __init__(
        self, rows: int, columns: int, format: str, dtype: torch.dtype, shared: PackedMatrix | None = None
    ) -> None:
        super().__init__()
        self.rows, self.columns, self.format, self.compute_dtype = rows, columns, format, dtype
        # In a tuple, so that torch does not take it for a part of this layer.
        self._shared = (shared,) if shared is not None else ()
        self._packed: PackedWeight | None = None
        if shared is None:
            shape = (rows, 2 * columns)
            if format != BF16:
                shape = (-(-rows // PANEL_ROWS), FORMATS[format].panel_bytes(columns))
            self.register_buffer("blocks", torch.empty(shape, dtype=torch.uint8))

    @property
    def source(self) -> PackedMatrix:
        """The layer that holds the bytes: this one, unless they are shared."""
        return self._shared[0] if self._shared else self

    @property
    def nbytes(self) -> int:
        """Of the blocks; 0 where they are another layer's."""
        return 0 if self._shared else self.blocks.nbytes

    def fill(self, weight: Tensor | PackedWeight) -> None:
        """Takes numbers `[N, C]`, which are rounded, or blocks of this layer's format as they are."""
        if isinstance(weight, PackedWeight):
            self.blocks = weight.panels
        elif self.format == BF16:
            self.blocks = weight.detach().to(torch.bfloat16).contiguous().view(torch.uint8)
        else:
            self.blocks = pack_weight(weight, cast("Literal['Q8_0', 'Q4_1']", self.format)).panels

    def packed(self) -> PackedWeight:
        """The weight as operations take it; not for `BF16`."""
        source = self.source
        if source._packed is None or source._packed.panels is not source.blocks:
            source._packed = PackedWeight(source.blocks, FORMATS[self.format], self.rows, self.columns)
        return source._packed

    def halves(self) -> Tensor:
        """The weight in bf16, `[N, C]`; for `BF16` only."""
        return self.source.blocks.view(torch.bfloat16)

    def numbers(self) -> Tensor:
        """What the blocks stand for, fp32 `[N, C]`."""
        if self.format == BF16:
            return self.halves().float()
        return packed_rows(self.packed(), torch.arange(self.rows, device=self.source.blocks.device))

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.rows}, format={self.format}"


class PackedLinear(PackedMatrix):
    """`nn.Linear` with its weight in blocks; the bias is a parameter as ever.

    Gradients reach the input and the bias. The weight has none: adapters train on top of it.

    Args:
        columns: Features in.
        rows: Features out.
        format: Name of a block format, or `BF16`.
        bias: Whether there is one.
        dtype: Of activations and of the bias.
        shared: As in `PackedMatrix`.
    """

    def __init__(
        self,
        columns: int,
        rows: int,
        format: str,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        shared: PackedMatrix | None = None,
    ) -> None:
        super().__init__(rows, columns, format, dtype, shared)
        self.in_features, self.out_features = columns, rows
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """`[..., C]` to `[..., N]`, in the dtype of the input."""
        if self.format != BF16:
            return packed_linear(input, self.packed(), self.bias)
        out = nn.functional.linear(input.to(torch.bfloat16), self.halves()).to(input.dtype)
        return out if self.bias is None else out + self.bias


class PackedEmbedding(PackedMatrix):
    """`nn.Embedding` with its weight in blocks.

    Args:
        rows: Tokens of the vocabulary.
        columns: Embedding dims.
        format: Name of a block format, or `BF16`.
        dtype: Of the embeddings.
    """

    def __init__(self, rows: int, columns: int, format: str, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(rows, columns, format, dtype)
        self.num_embeddings, self.embedding_dim = rows, columns

    def forward(self, ids: Tensor) -> Tensor:
        """`[...]` to `[..., C]`."""
        if self.format == BF16:
            return nn.functional.embedding(ids, self.halves()).to(self.compute_dtype)
        return packed_rows(self.packed(), ids).to(self.compute_dtype)
