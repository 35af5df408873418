"""One chunk of queries on its way through the keys, round after round; `triton.py` says how the rounds work.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `K` top-k. A row is one
query of a chunk; an extent is the number of keys between the first and the last that a block of rows sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dsa.ops import triton_support
from dsa.ops.index_topk.triton_kernels import score_kernel, select_kernel
from dsa.ops.ranges import VisibleRanges
from dsa.ops.triton_support import Config

_CANDIDATE_BYTES = 384 << 20
_BYTES_PER_CANDIDATE = 8
_KEY_MULTIPLE = 256
"""Rounds and segments are multiples of this, and so of every tile's width."""

_SELECT_REGISTERS = {8: 80, 16: 64}
"""By warps: `select_kernel` waits more than it computes, so several programs share a processor at a few spills."""

_INTERPRETER_PROCESSORS = 4

_BEYOND = 1 << 62


@dataclass(frozen=True)
class Limits:
    """Sizes that bound a launch; tests make them small.

    Args:
        rows: Queries of a chunk.
        first_round: Keys of the first of several rounds, at least; it also takes `2 K`.
        one_round: Candidates up to which one round takes all keys.
        candidates: Candidates of all rows of a chunk.
        block: Candidates that `select_kernel` holds in registers.
        segments: Segments of a round, at most: the more, the more work to find a candidate.
    """

    rows: int = 2048
    first_round: int = 4096
    one_round: int = 1 << 25
    candidates: int = _CANDIDATE_BYTES // _BYTES_PER_CANDIDATE
    block: int = 8192
    segments: int = 48


@dataclass(frozen=True)
class Operands:
    """What `score_kernel` multiplies; strides of queries are those of `[B, T, Hi, Di]`.

    With a block table, keys and scales are those of the pool, `[P, page, Di]` and `[P, page]`.
    """

    kind: str
    query: Tensor
    key: Tensor
    coefficient: Tensor
    key_scale: Tensor | None
    block_table: Tensor | None = None


class _Source(NamedTuple):
    """Where `select_kernel` finds a group's candidates; places are columns of the candidate buffer.

    Args:
        counts: Candidates in every segment, int32 `[rows, groups * segments]`, or `None` for a dense round.
        segments: Number of segments of a group.
        first: Place of the first segment.
        later: Place of the second; the others follow.
        spacing: Places between two segments after the first.
        group_keys: Places between two groups.
        dense_keys: Number of keys of a dense round.
        expected: How many candidates a group probably has; more only take longer.
    """

    counts: Tensor | None
    segments: int
    first: int
    later: int
    spacing: int
    group_keys: int
    dense_keys: int
    expected: int


class Chunk:
    """One chunk of queries on its way through the keys.

    A row of the candidate buffer holds one round, then two areas between which the best `K` so far alternate.
    """

    def __init__(
        self,
        operands: Operands,
        top_k: int,
        sinks: int,
        local: int,
        ranges: VisibleRanges,
        rows: tuple[slice, slice],
        limits: Limits,
    ) -> None:
        self._operands, self._top_k, self._sinks, self._local, self._limits = operands, top_k, sinks, local, limits
        # Queries that see at most K tokens are done: here they see nothing.
        start, end = ranges.start[rows], ranges.end[rows]
        crowded = end - start > top_k
        self._first, self._last = ((edge * crowded).int().contiguous() for edge in (start, end))
        start, end = ranges.host_start[rows], ranges.host_end[rows]
        crowded = end - start > top_k
        self._host_first, self._host_last = start.masked_fill(~crowded, _BEYOND), end * crowded
        self._batch, self._tokens = self._first.shape
        self._rows = self._batch * self._tokens
        self._device = self._first.device
        self._bound = torch.empty(self._rows, dtype=torch.int32, device=self._device)

    def select(self, selection: Tensor) -> None:
        """Writes the selection `[B, T, K]` of every query that sees more than `K` tokens."""
        limits, top_k = self._limits, self._top_k
        configs = score_configs(self._operands, self._tokens)
        extent = max(self._extent(config["BLOCK_M"]) for config in configs)
        first_round = round_up(extent)
        if self._rows * first_round > limits.one_round:
            first_round = min(first_round, round_up(max(limits.first_round, 2 * top_k)))
        group_keys = max(limits.block, 4 * top_k)
        groups = triton.cdiv(first_round, group_keys)
        fan_in = group_keys // top_k
        kept = (groups + triton.cdiv(groups, fan_in)) * top_k
        longest = (limits.candidates // self._rows - kept) // _KEY_MULTIPLE * _KEY_MULTIPLE
        longest = max(round_up(first_round // 2), min(longest, round_up(extent - first_round)))
        self._capacity = longest + kept
        self._candidates = self._empty(self._capacity, torch.int64)
        # The first round is over before the first segment is written.
        self._dense = self._candidates.view(torch.int32)
        best, spare = longest, longest + groups * top_k

        config = self._choose(configs, first_round)
        extent = self._extent(config["BLOCK_M"])
        self._score(config, 0, first_round)
        counts = self._empty(round_up(groups, fan_in)).zero_()
        source = _Source(None, 1, 0, 0, 0, group_keys, first_round, min(group_keys, first_round))
        last = first_round >= extent
        self._keep(source, config, groups, best, counts, selection if last and groups == 1 else None)
        while groups > 1:
            groups = triton.cdiv(groups, fan_in)
            source = _Source(counts, fan_in, best, best + top_k, top_k, fan_in * top_k, 0, fan_in * top_k)
            counts = self._empty(round_up(groups, fan_in)).zero_()
            self._keep(source, config, groups, spare, counts, selection if last and groups == 1 else None)
            best, spare = spare, best

        seen = first_round
        blocks = self._batch * triton.cdiv(self._tokens, config["BLOCK_M"])
        segments = max(1, min(_programs(self._device, config) // blocks, limits.segments, longest // _KEY_MULTIPLE))
        # Rounds that the segments share evenly.
        longest -= longest % (segments * _KEY_MULTIPLE)
        while seen < extent:
            # If age says nothing, K / seen of the new keys exceed the bound.
            end = min(seen + min(2 * seen, longest), round_up(extent))
            expected = top_k + 5 * top_k * (end - seen) // (4 * seen)
            segment_keys = round_up(triton.cdiv(end - seen, segments))
            arriving = self._empty(1 + segments)
            arriving[:, 0] = counts[:, 0]
            self._score(config, seen, end, segment_keys, arriving)
            source = _Source(arriving, 1 + segments, best, 0, segment_keys, 0, 0, expected)
            self._keep(source, config, 1, spare, counts, selection if end >= extent else None)
            best, spare = spare, best
            seen = end

    def _empty(self, columns: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(self._rows, columns, dtype=dtype, device=self._device)

    def _choose(self, configs: list[Config], keys: int) -> Config:
        """The tile to use; where that is decided by time, of a first round of so many keys."""
        shape = (
            self._operands.kind,
            self._operands.block_table is not None,
            *self._operands.query.shape[2:],
            configs[0]["BLOCK_M"],
        )
        return triton_support.choose(
            "index_topk", shape, configs, self._device, lambda config: self._score(config, 0, keys)
        )

    def _extent(self, block_m: int) -> int:
        """The most keys that any block of queries has to go through."""
        missing = -self._tokens % block_m
        first = torch.nn.functional.pad(self._host_first, (0, missing), value=_BEYOND)
        last = torch.nn.functional.pad(self._host_last, (0, missing))
        blocks = (self._batch, -1, block_m)
        return max(0, int((last.view(blocks).amax(-1) - first.view(blocks).amin(-1)).max()))

    def _score(self, config: Config, begin: int, end: int, segment_keys: int = 0, counts: Tensor | None = None) -> None:
        """Scores the keys at distances `[begin, end)` from the newest; with `counts`, keeps what exceeds the bound."""
        operands = self._operands
        heads, dim = operands.query.shape[2:]
        blocks = triton.cdiv(self._tokens, config["BLOCK_M"])
        if counts is None:
            programs = triton.cdiv(_programs(self._device, config), self._batch * blocks)
            segment_keys = round_up(triton.cdiv(end - begin, programs), config["BLOCK_N"])
        key_scale = operands.coefficient[:, 0] if operands.key_scale is None else operands.key_scale
        segments = triton.cdiv(end - begin, segment_keys) if counts is None else counts.shape[1] - 1
        table = operands.block_table
        score_kernel[(segments, blocks, self._batch)](
            operands.query, operands.key, operands.coefficient, key_scale,
            self._first if table is None else table, self._first, self._last, self._bound,
            self._dense, self._candidates, self._bound if counts is None else counts,
            operands.query.stride(), operands.key.stride(), key_scale.stride(),
            (0, 0) if table is None else table.stride(), operands.key.shape[0],
            self._tokens, begin, end, segment_keys, self._sinks, self._local, 2 * self._capacity, self._capacity,
            1 + segments,
            HEADS=heads, DIM=dim, BLOCK_D=max(32, triton.next_power_of_2(dim)),
            BLOCK_M=config["BLOCK_M"], BLOCK_N=config["BLOCK_N"], KIND=operands.kind,
            SCALED=operands.key_scale is not None, PAGE=0 if table is None else operands.key.shape[1],
            FILTER=counts is not None, STAGES=config["num_stages"], num_warps=config["num_warps"],
            maxnreg=config.get("maxnreg"),
            # The reference rounds products and sums one by one.
            enable_fp_fusion=operands.kind != "int8",
        )  # fmt: skip

    def _keep(
        self, source: _Source, config: Config, groups: int, target: int, counts: Tensor, selection: Tensor | None
    ) -> None:
        """Keeps the best of every group at `target`, or writes the selection, if given."""
        dense = source.counts is None
        counts_in = counts if source.counts is None else source.counts
        final = selection is not None
        result = self._bound if selection is None else selection
        block = min(self._limits.block, triton.next_power_of_2(max(16, source.expected)))
        warps = max(1, min(16, block // 512))
        select_kernel[(groups, self._tokens, self._batch)](
            self._dense if dense else self._candidates, self._candidates, counts_in, counts,
            self._first, self._last, self._bound, result,
            self._tokens, self._top_k, 2 * self._capacity if dense else self._capacity, self._capacity,
            source.dense_keys, source.group_keys, source.first, source.later, source.spacing, source.segments, target,
            counts_in.shape[1], counts.shape[1], result.stride(0),
            DENSE=dense, FINAL=final, BLOCK=block, BLOCK_M=config["BLOCK_M"],
            num_warps=warps, maxnreg=_SELECT_REGISTERS.get(warps),
        )  # fmt: skip


def round_up(size: int, multiple: int = _KEY_MULTIPLE) -> int:
    return -(-size // multiple) * multiple


def _programs(device: torch.device, config: Config) -> int:
    """How many programs of `score_kernel` run on the device at the same time; registers are what limits them."""
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    threads = 32 * config["num_warps"]
    # Scores and products take one register each; the rest is what the compiler was seen to use.
    registers = min(config.get("maxnreg", 255), 110 + 2 * config["BLOCK_M"] * config["BLOCK_N"] // threads)
    return triton_support.processors(device.index or 0) * max(1, (1 << 16) // (threads * registers))


def score_configs(operands: Operands, tokens: int) -> list[Config]:
    """Tiles to choose from, best guess first."""
    rows = min(64, max(16, triton.next_power_of_2(tokens)))
    if operands.query.device.type != "cuda":
        return [_config(16, 128, 4, 1)]
    if operands.kind == "fp32":
        return [_config(min(rows, 32), 64, 4, 2)]
    row_bytes = triton.next_power_of_2(operands.query.shape[-1]) * operands.query.element_size()
    configs = [_config(rows, 128, 4, 3)]
    if rows == 64:
        small = _config(64, 64, 4, 3)
        configs += [_config(128, 128, 8, 3), small]
        # Three programs on a processor hide each other's waiting, if their tiles fit; the registers that this takes
        # away are missed outside the loop over heads only.
        configs.insert(0 if row_bytes <= 128 else 1, configs[0] | {"maxnreg": 168})
        if triton_support.capability(operands.query.device.index or 0)[0] not in (9, 10):
            # Matrix instructions of single warps need the operands in registers too.
            configs.sort(key=lambda config: config != small)

    def shared_bytes(config: Config) -> int:
        keys, queries = config["BLOCK_N"], config["BLOCK_M"] * (config["num_stages"] - 1)
        return (keys + queries) * row_bytes + 2 * keys * keys + (1 << 10)

    return triton_support.fitting(configs, shared_bytes, operands.query.device)


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
