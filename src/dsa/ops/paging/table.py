"""Block tables: where the tokens of a sequence lie in a pool of pages.

Shapes: `B` batch, `T` query tokens, `K` selected tokens, `P` pages, `N` entries of a table's row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa.ops.checks import check_indices, check_tensor, describe


def check_table(what: str, table: object, pages: Tensor) -> None:
    """Checks kind, shape and device of a block table; its entries are checked where they are used.

    Raises:
        TypeError: Not an int32 tensor.
        ValueError: Not `[B, N]`, or on another device than the pages.
    """
    if not isinstance(table, Tensor) or table.dtype != torch.int32:
        raise TypeError(f"{what}: block_table must be int32 [B, N], got {describe(table)}; convert it")
    if table.ndim != 2:
        raise ValueError(f"{what}: block_table must be [B, N], got {describe(table)}")
    if table.device != pages.device:
        raise ValueError(f"{what}: block_table is on {table.device}, pages on {pages.device}; move one")


def check_tokens(what: str, tokens: int | None, table: Tensor, block: int) -> int:
    """How many tokens of each sequence there are: `tokens`, or all that the table has room for.

    Raises:
        ValueError: More than that, or fewer than none.
    """
    room = table.shape[1] * block
    if tokens is None:
        return room
    if not 0 <= tokens <= room:
        raise ValueError(
            f"{what}: tokens must lie in [0, N * block] = [0, {table.shape[1]} * {block}], got {tokens}; "
            "add blocks to the table"
        )
    return tokens


def physical_indices(
    indices: Tensor, block_table: Tensor, pages: int, block: int = 64, tokens: int | None = None
) -> Tensor:
    """Positions in sequences to positions in a pool of pages, which serving kernels take for indices.

    Args:
        indices: Integers `[B, T, K]` in `[-1, S)`; `-1` stays `-1`.
        block_table: int32 `[B, N]`: the page of each block of tokens. Entries that no index needs are not looked at.
        pages: `P`, how many pages the pool has.
        block: Tokens of a page.
        tokens: `S`; `None` means `N * block`.

    Returns:
        int32 `[B, T, K]` in `[-1, P * block)`: `block_table[b, s // block] * block + s % block`.

    Raises:
        TypeError: Indices that are not integers, or a table that is not int32.
        ValueError: An index outside `[-1, S)`, or a table entry that is needed and lies outside `[0, P)`.
    """
    op = "physical_indices"
    check_tensor(op, "indices", indices, "[B, T, K]", (None, None, None), integer=True)
    check_table(op, block_table, indices)
    if block_table.shape[0] != indices.shape[0]:
        raise ValueError(
            f"{op}: block_table must have a row for each of {indices.shape[0]} batch rows, got {describe(block_table)}"
        )
    padded = check_indices(op, indices, check_tokens(op, tokens, block_table, block))
    if not indices.numel() or not block_table.shape[1]:
        return indices.int()
    position = indices.clamp_min(0).long().flatten(1)
    page = block_table.gather(1, position // block).view_as(indices)
    missing = page.masked_fill(indices < 0, 0) if padded else page
    _check_entries(op, missing, pages)
    place = page * block + (position % block).view_as(indices).int()
    return place.masked_fill(indices < 0, -1) if padded else place


def places_of(block_table: Tensor, pages: int, block: int, start: int, stop: int) -> Tensor:
    """Positions int32 `[B, stop - start]` in the pool of the tokens `start` to `stop` of every sequence.

    Raises:
        ValueError: A table entry that is needed lies outside `[0, P)`.
    """
    position = torch.arange(start, stop, device=block_table.device)
    page = block_table[:, position // block]
    _check_entries("block_table", page, pages)
    return page * block + (position % block).int()


def _check_entries(op: str, entries: Tensor, pages: int) -> None:
    if not entries.numel():
        return
    lowest, highest = (int(value) for value in torch.stack(entries.aminmax()).tolist())
    if lowest < 0 or highest >= pages:
        raise ValueError(
            f"{op}: the block_table entries of tokens that are read or written must lie in [0, P) = [0, {pages}), "
            f"got values from {lowest} to {highest}; nothing was read through them"
        )
