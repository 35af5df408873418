"""Caches in pages: blocks of tokens in one pool, and a table that says where each sequence's blocks lie.

The layouts are those of the serving engines, so that a pool can be handed over as it is. Token `s` of batch row `b` is
token `s % block` of page `block_table[b, s // block]`. Entries of the table that no token needs may be `-1`.

Shapes: `B` batch, `S` tokens of a sequence, `P` pages, `N` entries of a table's row, `Di` index head dim, `L`/`R`
latent / rotated dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsa.ops.checks import describe
from dsa.ops.packed_latents.types import PackedLatents, check_row_bytes
from dsa.ops.paging.table import check_table, check_tokens, physical_indices, places_of
from dsa.ops.quantize.types import QuantizedKeys

BLOCK = 64
"""Tokens of a page in the serving engines."""

_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class PagedLatents:
    """FP8 rows in pages, in the place of `k` and `v` of `sparse_attention`; indices stay those of the sequence.

    Args:
        pages: uint8 `[P, block, row_bytes]`, each row as `PackedLatents` describes it. FlashMLA's
            `[P, block, 1, row_bytes]` is this after `squeeze(2)`.
        block_table: int32 `[B, N]`.
        tokens: `S`, how many tokens of each sequence there are, at most; `None` means all `N * block`. Shorter
            sequences of a batch are told apart by the indices.
        latent_dim: `L`.
        rope_dim: `R`.

    Raises:
        TypeError: Pages that are not uint8, or a table that is not int32.
        ValueError: Shapes or devices that do not fit, rows of another length, or more tokens than the table has
            room for.
    """

    pages: Tensor
    block_table: Tensor
    tokens: int | None = None
    latent_dim: int = 512
    rope_dim: int = 64

    def __post_init__(self) -> None:
        _check_pages("PagedLatents", self.pages, "[P, block, row_bytes]")
        check_row_bytes("PagedLatents: pages", self.pages, 3, self.latent_dim, self.rope_dim)
        if self.pages.stride(0) != self.pages.shape[1] * self.pages.stride(1):
            raise ValueError(
                "PagedLatents: pages must follow each other in memory, row after row, got strides "
                f"{self.pages.stride()}; make them contiguous"
            )
        check_table("PagedLatents", self.block_table, self.pages)
        object.__setattr__(self, "tokens", check_tokens("PagedLatents", self.tokens, self.block_table, self.block))

    @property
    def block(self) -> int:
        """Tokens of a page."""
        return self.pages.shape[1]

    @property
    def shape(self) -> torch.Size:
        """`[B, S, L + R]`."""
        assert self.tokens is not None
        return torch.Size((self.block_table.shape[0], self.tokens, self.latent_dim + self.rope_dim))

    @property
    def device(self) -> torch.device:
        """Where pages and table live."""
        return self.pages.device

    def pool(self) -> PackedLatents:
        """All pages as one sequence that every batch row shares, a view: what physical indices point into."""
        data = self.pages.view(-1, self.pages.shape[-1])
        return PackedLatents(data.expand(self.block_table.shape[0], *data.shape), self.latent_dim, self.rope_dim)

    def physical(self, indices: Tensor) -> Tensor:
        """Positions `[B, T, K]` in the sequences to positions in the pool; see `physical_indices`."""
        assert self.tokens is not None
        return physical_indices(indices, self.block_table, self.pages.shape[0], self.block, self.tokens)

    def gather(self) -> PackedLatents:
        """The rows of all `S` tokens one after the other, a copy `[B, S, row_bytes]`.

        Raises:
            ValueError: A table entry that is needed is not a page.
        """
        places = places_of(self.block_table, self.pages.shape[0], self.block, 0, self.shape[1])
        return PackedLatents(self.pages.view(-1, self.pages.shape[-1])[places.long()], self.latent_dim, self.rope_dim)

    def write(self, rows: PackedLatents, start: int = 0) -> None:
        """Writes rows to the places of the tokens `start, start + 1, ...` of each sequence, in the pages themselves.

        Raises:
            ValueError: Rows of another size, more than `S` tokens, or a table entry that is needed and is not a page.
        """
        if (rows.shape[0], rows.latent_dim, rows.rope_dim) != (self.shape[0], self.latent_dim, self.rope_dim):
            raise ValueError(
                f"PagedLatents.write: rows must be [{self.shape[0]}, any, {self.latent_dim} + {self.rope_dim}] like "
                f"the pages, got [{rows.shape[0]}, {rows.shape[1]}, {rows.latent_dim} + {rows.rope_dim}]"
            )
        places = _places_to_write("PagedLatents.write", self, start, rows.shape[1])
        self.pages.view(-1, self.pages.shape[-1])[places] = rows.data


@dataclass(frozen=True)
class PagedKeys:
    """Index keys in pages, in the place of `k` of `index_topk`: e4m3 or int8, with one fp32 scale a token.

    Within a page the data of its tokens come first, `block * Di` bytes, then their scales, `block * 4` bytes. That is
    how the engines lay out what they declare as `[P, block, Di + 4]`.

    Args:
        pages: uint8 `[P, block, Di + 4]`.
        block_table: int32 `[B, N]`.
        tokens: `S`, how many tokens of each sequence there are, at most; `None` means all `N * block`. For shorter
            sequences of a batch give `index_topk` their `key_end`.
        dtype: What the data bytes are.

    Raises:
        TypeError: Pages that are not uint8, or a table that is not int32.
        ValueError: Shapes or devices that do not fit, an unknown dtype, or more tokens than the table has room for.
    """

    pages: Tensor
    block_table: Tensor
    tokens: int | None = None
    dtype: Literal["fp8", "int8"] = "fp8"

    def __post_init__(self) -> None:
        _check_pages("PagedKeys", self.pages, "[P, block, Di + 4]")
        if self.dtype not in _DTYPES:
            raise ValueError(f"PagedKeys: dtype must be 'fp8' or 'int8', got {self.dtype!r}")
        if self.pages.shape[-1] <= 4:
            raise ValueError(
                f"PagedKeys: pages must be [P, block, Di + 4], got {describe(self.pages)}, which leaves no byte for "
                "a key"
            )
        if not self.pages.is_contiguous() or self.block * (self.pages.shape[-1] - 4) % 4:
            raise ValueError(
                "PagedKeys: pages must be contiguous, and their scales begin at a multiple of four bytes: got "
                f"{list(self.pages.shape)} with strides {self.pages.stride()}; make them contiguous, with block * Di a "
                "multiple of 4"
            )
        check_table("PagedKeys", self.block_table, self.pages)
        object.__setattr__(self, "tokens", check_tokens("PagedKeys", self.tokens, self.block_table, self.block))

    @property
    def block(self) -> int:
        """Tokens of a page."""
        return self.pages.shape[1]

    @property
    def shape(self) -> torch.Size:
        """`[B, S, Di]`."""
        assert self.tokens is not None
        return torch.Size((self.block_table.shape[0], self.tokens, self.pages.shape[-1] - 4))

    @property
    def device(self) -> torch.device:
        """Where pages and table live."""
        return self.pages.device

    def gather(self) -> QuantizedKeys:
        """The keys of all `S` tokens one after the other, a copy.

        Raises:
            ValueError: A table entry that is needed is not a page.
        """
        data, scale = self.parts()
        places = places_of(self.block_table, self.pages.shape[0], self.block, 0, self.shape[1]).long()
        page, row = places // self.block, places % self.block
        return QuantizedKeys(data[page, row].view(_DTYPES[self.dtype]), scale[page, row])

    def write(self, keys: QuantizedKeys, start: int = 0) -> None:
        """Writes keys to the places of the tokens `start, start + 1, ...` of each sequence, in the pages themselves.

        Raises:
            ValueError: Keys of another size or dtype, more than `S` tokens, or a table entry that is needed and is not
                a page.
        """
        if (keys.shape[0], keys.shape[2], keys.dtype) != (self.shape[0], self.shape[2], self.dtype):
            raise ValueError(
                f"PagedKeys.write: keys must be {self.dtype} [{self.shape[0]}, any, {self.shape[2]}] like the pages, "
                f"got {keys.dtype} {list(keys.shape)}"
            )
        places = _places_to_write("PagedKeys.write", self, start, keys.shape[1])
        data, scale = self.parts()
        page, row = places // self.block, places % self.block
        data[page, row] = keys.data.view(torch.uint8)
        scale[page, row] = keys.scale

    def parts(self) -> tuple[Tensor, Tensor]:
        """Bytes of the data `[P, block, Di]` and scales `[P, block]`, views of the pages."""
        count, block, width = self.pages.shape
        flat = self.pages.view(count, block * width)
        split = block * (width - 4)
        return flat[:, :split].unflatten(1, (block, width - 4)), flat[:, split:].view(torch.float32)


def _check_pages(what: str, pages: object, legend: str) -> None:
    if not isinstance(pages, Tensor) or pages.dtype != torch.uint8:
        raise TypeError(
            f"{what}: pages must be uint8 {legend}, got {describe(pages)}; view them as bytes with .view(torch.uint8)"
        )
    if pages.ndim != 3 or pages.shape[1] == 0:
        raise ValueError(f"{what}: pages must be {legend} with at least one token a page, got {describe(pages)}")


def _places_to_write(what: str, paged: PagedLatents | PagedKeys, start: int, count: int) -> Tensor:
    if start < 0 or start + count > paged.shape[1]:
        raise ValueError(
            f"{what}: tokens {start} to {start + count} do not fit, there is room for {paged.shape[1]}; "
            "add blocks to the table"
        )
    return places_of(paged.block_table, paged.pages.shape[0], paged.block, start, start + count).long()
