"""Which keys each query may see, and the blocks of queries that operations stream over.

Shapes: `B` batch, `T` query tokens, `S` key tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa.ops.blocks import rows_per_block
from dsa.ops.checks import check_tensor

_BEYOND = 1 << 62
"""Later than any key."""


class Block(NamedTuple):
    """Some queries and the key columns that any of them can see.

    Args:
        batch: Rows of the batch, normally all.
        rows: Query tokens.
        columns: Key tokens; empty if no query of the block sees anything.
    """

    batch: slice
    rows: slice
    columns: slice

    @property
    def width(self) -> int:
        """Number of key columns."""
        return self.columns.stop - self.columns.start


@dataclass(frozen=True)
class VisibleRanges:
    """Query `t` of batch `b` sees the keys in `[start[b, t], end[b, t])`, none if the range is empty.

    Args:
        start: int64 `[B, T]` on the device of the operation.
        end: int64 `[B, T]` on the device of the operation.
        host_start: `start` on the CPU: the loops over blocks read it without waiting for the device.
        host_end: `end` on the CPU.
    """

    start: Tensor
    end: Tensor
    host_start: Tensor
    host_end: Tensor

    def shrink(self, sinks: int, local: int) -> VisibleRanges:
        """The ranges without the first `sinks` and the last `local` visible keys."""
        return VisibleRanges(self.start + sinks, self.end - local, self.host_start + sinks, self.host_end - local)

    def select(self, rows: Tensor) -> VisibleRanges:
        """The ranges of some query tokens, given by their positions on the CPU."""
        device_rows = rows.to(self.start.device)
        return VisibleRanges(
            self.start[:, device_rows],
            self.end[:, device_rows],
            self.host_start[:, rows],
            self.host_end[:, rows],
        )

    def only(self, counted: Tensor) -> VisibleRanges:
        """The ranges of the queries in a mask `[B, T]` on the CPU; all others see nothing."""
        device_counted = counted.to(self.start.device)
        return VisibleRanges(
            self.start * device_counted,
            self.end * device_counted,
            self.host_start * counted,
            self.host_end * counted,
        )

    def seen_keys(self, keys: int) -> Tensor:
        """Mask `[B, S]` of the keys that some query sees."""
        seeing = (self.host_end > self.host_start).int()
        changes = torch.zeros(self.host_start.shape[0], keys + 1, dtype=torch.int32)
        changes.scatter_add_(1, self.host_start.clamp(0, keys), seeing)
        changes.scatter_add_(1, self.host_end.clamp(0, keys), -seeing)
        return (changes.cumsum(dim=1)[:, :keys] > 0).to(self.start.device)

    def blocks(self, bytes_per_pair: int) -> Iterator[Block]:
        """Splits the queries into blocks, over the whole batch, whose temporaries fit the budget of the device.

        Args:
            bytes_per_pair: What a block needs for each of its query tokens times each of its columns.
        """
        batch, tokens = self.host_start.shape
        if batch == 0:
            return
        empty = self.host_end <= self.host_start
        first = self.host_start.masked_fill(empty, _BEYOND).amin(dim=0)
        last = self.host_end.masked_fill(empty, 0).amax(dim=0)
        pairs = rows_per_block(bytes_per_pair, self.start.device)
        row = 0
        while row < tokens:
            # As many queries as the columns of the first allow, then fewer until their union fits.
            count = min(tokens - row, pairs // max(1, int(last[row] - first[row])))
            while True:
                count = max(1, count)
                rows = slice(row, row + count)
                high = int(last[rows].max())
                low = min(int(first[rows].min()), high)
                if count == 1 or count * (high - low) <= pairs:
                    break
                count = max(pairs // (high - low), count // 2)
            yield Block(slice(0, batch), rows, slice(low, high))
            row += count

    def single_queries(self) -> Iterator[Block]:
        """One block per query, with exactly the columns that it sees."""
        batch, tokens = self.host_start.shape
        for b in range(batch):
            for t in range(tokens):
                low, high = int(self.host_start[b, t]), int(self.host_end[b, t])
                yield Block(slice(b, b + 1), slice(t, t + 1), slice(low, max(low, high)))

    def edges_within(self, block: Block) -> list[tuple[int, int]]:
        """The parts of a block's columns that some of its queries do not see; all see everything in between.

        A query that sees nothing makes every column an edge. Masking edges only spares most of the passes.
        """
        first, last = block.columns.start, block.columns.stop
        start, end = self.host_start[block.batch, block.rows], self.host_end[block.batch, block.rows]
        empty = end <= start
        inner_first = int(start.masked_fill(empty, _BEYOND).max())
        inner_last = int(end.masked_fill(empty, 0).min())
        if inner_first >= inner_last:
            return [(first, last)] if first < last else []
        return [(left, right) for left, right in ((first, inner_first), (inner_last, last)) if left < right]

    def visible(self, block: Block, left: int, right: int) -> Tensor:
        """Mask `[B, block, right - left]` of the keys in `[left, right)` that each query of a block sees."""
        columns = torch.arange(left, right, device=self.start.device)
        start = self.start[block.batch, block.rows].unsqueeze(-1)
        end = self.end[block.batch, block.rows].unsqueeze(-1)
        return (columns >= start) & (columns < end)

    def hidden_within(self, block: Block) -> list[tuple[slice, Tensor]]:
        """What a block must mask: slices of its columns, with masks `[B, block, slice]` of what is hidden."""
        low = block.columns.start
        return [
            (slice(left - low, right - low), ~self.visible(block, left, right))
            for left, right in self.edges_within(block)
        ]


def fill_hidden(scores: Tensor, hidden: list[tuple[slice, Tensor]], value: float) -> None:
    """Writes `value` where keys are hidden: `scores` is `[B, block, (heads,) columns]`."""
    for columns, mask in hidden:
        scores[..., columns].masked_fill_(mask if scores.ndim == 3 else mask.unsqueeze(2), value)


def resolve_ranges(
    op: str,
    key_start: Tensor | None,
    key_end: Tensor | None,
    batch: int,
    tokens: int,
    keys: int,
    device: torch.device,
) -> VisibleRanges:
    """Validates visible ranges and fills in the defaults: causal and right-aligned.

    Args:
        op: Name of the operation, for messages.
        key_start: First visible key, integers `[B, T]`; `None` is 0.
        key_end: One past the last visible key, integers `[B, T]`; `None` is `S - T + t + 1`, at least 0.
        batch: `B`.
        tokens: `T`.
        keys: `S`.
        device: Where the operation runs.

    Raises:
        TypeError: Not integers.
        ValueError: Wrong shape or device, or a value outside `[0, S]`.
    """
    for name, given in (("key_start", key_start), ("key_end", key_end)):
        if given is not None:
            check_tensor(op, name, given, "[B, T]", (batch, tokens), device=device, integer=True)
    if key_start is None and key_end is None:
        start, end = _default_start(batch, tokens), _default_end(batch, tokens, keys)
        return VisibleRanges(start.to(device), end.to(device), start, end)
    if key_start is None:
        key_start = _default_start(batch, tokens).to(device)
    if key_end is None:
        key_end = _default_end(batch, tokens, keys).to(device)
    both = torch.stack((key_start.long(), key_end.long()))
    host = both.cpu()
    for name, values in zip(("key_start", "key_end"), host):
        if values.numel() and (int(values.min()) < 0 or int(values.max()) > keys):
            raise ValueError(
                f"{op}: {name} must lie in [0, S] = [0, {keys}], got values from {int(values.min())} to "
                f"{int(values.max())}; clamp it"
            )
    return VisibleRanges(both[0], both[1], host[0], host[1])


def ranges_for_kernels(
    op: str,
    key_start: Tensor | None,
    key_end: Tensor | None,
    batch: int,
    tokens: int,
    keys: int,
    device: torch.device,
) -> VisibleRanges:
    """`resolve_ranges` without the copies between host and device that a graph cannot capture.

    While one is captured, given ranges are cut to `[0, S]` in place of being checked, and the host assumes that every
    query sees all keys: that says how far kernels go, and they look at the ranges themselves.
    """
    given = key_start is not None or key_end is not None
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if given and not capturing:
        return resolve_ranges(op, key_start, key_end, batch, tokens, keys, device)
    host = resolve_ranges(op, None, None, batch, tokens, keys, torch.device("cpu"))
    if key_start is None:
        key_start = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    if key_end is None:
        key_end = torch.arange(keys - tokens + 1, keys + 1, device=device).clamp_min(0).expand(batch, tokens)
    last = torch.full_like(host.host_end, keys) if given else host.host_end
    return VisibleRanges(key_start.long().clamp(0, keys), key_end.long().clamp(0, keys), host.host_start, last)


def _default_start(batch: int, tokens: int) -> Tensor:
    return torch.zeros(batch, tokens, dtype=torch.int64)


def _default_end(batch: int, tokens: int, keys: int) -> Tensor:
    return torch.arange(keys - tokens + 1, keys + 1).clamp_min(0).expand(batch, tokens)
