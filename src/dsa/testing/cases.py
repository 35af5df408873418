"""The cases that every implementation of every operation is tested on, and the inputs made from them.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `H`/`G` query / KV heads,
`D`/`Dv` head dims of keys / values, `Gs` selections of a query, `K` top-k.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "index_topk": ("reference", "native"),
    "sparse_attention": ("reference", "native"),
    "packed_attention": ("reference", "native"),
    "dense_attention": ("reference", "native"),
    "indexer_loss": ("reference", "native"),
    "index_projection": ("reference", "native"),
    "packed_linear": ("reference", "native"),
}
"""By operation, what the tests run; a new implementation adds its name here and is held to all cases."""

Ranges = tuple[Tensor, Tensor] | None
"""`key_start, key_end`, int32 `[B, T]` each, or `None` for the defaults."""

Content = Literal["random", "tied", "poisoned"]
"""`tied`: small whole numbers, so that many scores are equal and every sum is exact. `poisoned`: some NaN and
infinite entries."""

EDGES = (-100.0, 100.0, -88.0, 88.0, -104.0, 0.0)
"""Sink logits whose exponentials are subnormal in fp32, overflow, or nearly do."""


def causal(batch: int, tokens: int, keys: int) -> Ranges:
    """The defaults."""
    return None


def everything(batch: int, tokens: int, keys: int) -> Ranges:
    """Every query sees every key."""
    return _ranges(torch.zeros(batch, tokens), torch.full((batch, tokens), keys))


def left_padded(batch: int, tokens: int, keys: int) -> Ranges:
    """Batch row `b` begins with `5 b + 3` keys of padding; queries within the padding see nothing."""
    _, end = _causal(batch, tokens, keys)
    start = (5 * torch.arange(batch) + 3).clamp_max(keys).unsqueeze(1).expand(batch, tokens)
    return _ranges(start, end)


def right_padded(batch: int, tokens: int, keys: int) -> Ranges:
    """Batch row `b` ends with `7 b + 2` keys of padding; queries in the padding see all that is real."""
    start, end = _causal(batch, tokens, keys)
    length = (keys - 7 * torch.arange(batch) - 2).clamp_min(0).unsqueeze(1)
    return _ranges(start, torch.minimum(end, length))


def packed(batch: int, tokens: int, keys: int) -> Ranges:
    """Documents of 11 tokens, one after the other."""
    _, end = _causal(batch, tokens, keys)
    return _ranges((end - 1).clamp_min(0) // 11 * 11, end)


def window(batch: int, tokens: int, keys: int) -> Ranges:
    """The last 16 keys."""
    _, end = _causal(batch, tokens, keys)
    return _ranges((end - 16).clamp_min(0), end)


def scattered(batch: int, tokens: int, keys: int) -> Ranges:
    """Ends in no order, as a random subset of a sequence's queries has; every third query sees nothing."""
    generator = torch.Generator().manual_seed(3)
    end = torch.randint(0, keys + 1, (batch, tokens), generator=generator)
    start = end // 5
    start[:, 1::3] = end[:, 1::3]
    return _ranges(start, end)


def nothing(batch: int, tokens: int, keys: int) -> Ranges:
    """No query sees anything."""
    return _ranges(torch.full((batch, tokens), keys), torch.zeros(batch, tokens))


def _causal(batch: int, tokens: int, keys: int) -> tuple[Tensor, Tensor]:
    end = torch.arange(keys - tokens + 1, keys + 1).clamp_min(0).expand(batch, tokens)
    return torch.zeros_like(end), end


def _ranges(start: Tensor, end: Tensor) -> Ranges:
    return start.to(torch.int32), end.to(torch.int32)


@dataclass(frozen=True)
class Case:
    """One situation that every operation must handle.

    Args:
        name: Test id.
        batch: `B`.
        tokens: `T`.
        keys: `S`.
        heads: `H`.
        groups: `G`.
        head_dim: `D`.
        value_dim: `Dv`.
        index_heads: `Hi`.
        index_dim: `Di`.
        top_k: `K`.
        selections: `Gs`; `None` leaves the dim out of index weights and indices.
        sinks: Always selected, left out of the loss.
        local: Always selected, left out of the loss.
        ranges: Makes the visible ranges from `B, T, S`.
        dtype: Of all queries, weights and index keys.
        key_dtype: Of `k` and `v`, where narrower.
        content: What the tensors hold.
        strided: Whether tensors are views into larger, differently ordered ones.
        softcap: On the attention scores.
        sink: Whether there are sink logits.
        sink_values: What they are, head by head from the first on again; random ones where there are none.
    """

    name: str
    batch: int = 2
    tokens: int = 37
    keys: int = 37
    heads: int = 6
    groups: int = 3
    head_dim: int = 8
    value_dim: int = 8
    index_heads: int = 4
    index_dim: int = 16
    top_k: int = 7
    selections: int | None = None
    sinks: int = 0
    local: int = 0
    ranges: Callable[[int, int, int], Ranges] = causal
    dtype: torch.dtype = torch.float32
    key_dtype: torch.dtype | None = None
    content: Content = "random"
    strided: bool = False
    softcap: float | None = None
    sink: bool = False
    sink_values: tuple[float, ...] = ()


CASES = (
    Case("odd_lengths"),
    Case("one_of_everything", batch=1, heads=1, groups=1, head_dim=1, value_dim=1, index_heads=1, index_dim=1),
    Case("chunked_prefill", tokens=11, keys=41),
    Case("decode", batch=1, tokens=1, keys=53),
    Case("batched_decode", batch=3, tokens=1, keys=53, ranges=left_padded),
    Case("all_keys_selected", tokens=13, keys=13, top_k=13),
    Case("more_places_than_keys", tokens=9, keys=13, top_k=31),
    Case("one_place", top_k=1),
    Case("more_queries_than_keys", tokens=29, keys=17),
    Case("bidirectional", ranges=everything),
    Case("left_padding", ranges=left_padded),
    Case("right_padding", ranges=right_padded),
    Case("packed_documents", ranges=packed, top_k=5),
    Case("sliding_window", ranges=window),
    Case("scattered_queries", ranges=scattered, tokens=23, keys=47),
    Case("nothing_visible", ranges=nothing, tokens=5),
    Case("sinks", sinks=3),
    Case("local", local=4),
    Case("sinks_and_local", sinks=2, local=3, ranges=left_padded),
    Case("only_sinks_and_local", sinks=3, local=4),
    Case("sinks_and_local_scattered", sinks=2, local=2, ranges=scattered, tokens=23, keys=47),
    Case("multi_query", groups=1),
    Case("multi_head", groups=6),
    Case("narrow_values", value_dim=5),
    Case("wide_values", head_dim=7, value_dim=12),
    Case("one_index_head", index_heads=1),
    Case("index_dim_24", index_dim=24),
    Case("ties", content="tied"),
    Case("ties_sinks_and_local", content="tied", sinks=1, local=2, index_heads=1),
    Case("ties_scattered", content="tied", ranges=scattered, tokens=23, keys=47, index_heads=2),
    Case("not_finite", content="poisoned", tokens=19, keys=31),
    Case("not_finite_padded", content="poisoned", ranges=left_padded, sinks=1, local=1),
    Case("strided", strided=True),
    Case("strided_padded", strided=True, ranges=right_padded, groups=1, value_dim=5),
    Case("no_queries", tokens=0, keys=5),
    Case("no_batch", batch=0, tokens=3, keys=5),
    Case("no_keys", tokens=3, keys=0),
    Case("bf16_keys", key_dtype=torch.bfloat16),
    Case("fp16_keys", key_dtype=torch.float16),
    Case("bf16", dtype=torch.bfloat16),
    Case("fp16", dtype=torch.float16, ranges=left_padded),
    Case("fp64", dtype=torch.float64),
    Case("softcap", softcap=1.5),
    Case("sink_logits", sink=True, ranges=left_padded),
    Case("sinks_at_the_edges", sink=True, sink_values=EDGES, ranges=scattered, tokens=23, keys=47),
    Case(
        "sinks_at_the_edges_decode",
        tokens=1,
        keys=53,
        sink=True,
        sink_values=EDGES,
        ranges=scattered,
        head_dim=16,
        value_dim=16,
    ),
    Case("nothing_but_sinks", sink=True, sink_values=EDGES, ranges=nothing, tokens=5),
    Case("softcap_and_sink_logits", softcap=2.0, sink=True, groups=1, sinks=2, local=3),
)


SELECTION_CASES = (
    Case("of_each_group", selections=3),
    Case("of_two_groups", heads=8, groups=4, selections=2),
    Case("one_of_all", selections=1),
    Case("one_of_one", groups=1, selections=1),
    Case("each_decode", batch=1, tokens=1, keys=53, selections=3),
    Case("each_decode_padded", batch=3, tokens=1, keys=53, ranges=left_padded, selections=3, sinks=1, local=2),
    Case("each_everything", tokens=13, keys=13, top_k=13, selections=3),
    Case("each_more_places", tokens=9, keys=13, top_k=31, selections=3),
    Case("each_scattered", ranges=scattered, tokens=23, keys=47, selections=3, sinks=2, local=2),
    Case("each_packed", ranges=packed, top_k=5, selections=3, index_heads=5),
    Case("each_only_always_read", selections=3, sinks=3, local=4),
    Case("each_tied", content="tied", selections=3, sinks=1, local=2, index_heads=1),
    Case("each_not_finite", content="poisoned", tokens=19, keys=31, selections=3),
    Case("each_strided", strided=True, ranges=right_padded, value_dim=5, selections=3),
    Case("each_bf16", dtype=torch.bfloat16, selections=3),
    Case("each_fp64", dtype=torch.float64, selections=3),
    Case("each_nothing_visible", ranges=nothing, tokens=5, selections=3),
    Case("each_no_queries", tokens=0, keys=5, selections=3),
    Case("each_no_batch", batch=0, tokens=3, keys=5, selections=3),
    Case("each_no_keys", tokens=3, keys=0, selections=3),
    Case("each_softcap_and_sink_logits", softcap=2.0, sink=True, selections=3, sinks=2, local=3),
)
"""Of operations over several selections of a query."""


@dataclass(frozen=True)
class Inputs:
    """Tensors for every operation, made from one case; names and shapes are those of the operations."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink_logits: Tensor | None
    q_index: Tensor
    k_index: Tensor
    w_index: Tensor
    key_start: Tensor | None
    key_end: Tensor | None
    query_mask: Tensor
    indices: Tensor


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """The inputs of a case: always the same numbers, on every device.

    `indices` is a random selection that keeps no convention but `[-1, S)`: in no order, padded anywhere, without
    duplicates.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    batch, tokens, keys = case.batch, case.tokens, case.keys

    def tensor(*sizes: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return _fill(sizes, case, generator).to(device=device, dtype=dtype)

    key_dtype = case.key_dtype or case.dtype
    several = () if case.selections is None else (case.selections,)
    places = torch.rand(batch, tokens, *several, keys, generator=generator).argsort(dim=-1)[..., : case.top_k].int()
    places = torch.nn.functional.pad(places, (0, case.top_k - places.shape[-1]), value=-1)
    unused = torch.rand(places.shape, generator=generator) < 0.3
    ranges = case.ranges(batch, tokens, keys) or (None, None)
    return Inputs(
        q=tensor(batch, tokens, case.heads, case.head_dim),
        k=tensor(batch, keys, case.groups, case.head_dim, dtype=key_dtype),
        v=tensor(batch, keys, case.groups, case.value_dim, dtype=key_dtype),
        sink_logits=_sinks(case, generator).to(device, case.dtype) if case.sink else None,
        q_index=tensor(batch, tokens, case.index_heads, case.index_dim),
        k_index=tensor(batch, keys, case.index_dim),
        w_index=tensor(batch, tokens, *several, case.index_heads),
        key_start=None if ranges[0] is None else ranges[0].to(device),
        key_end=None if ranges[1] is None else ranges[1].to(device),
        query_mask=(torch.rand(batch, tokens, generator=generator) < 0.7).to(device),
        indices=places.masked_fill(unused, -1).to(device),
    )


def _sinks(case: Case, generator: torch.Generator) -> Tensor:
    if not case.sink_values:
        return torch.randn(case.heads, generator=generator)
    return torch.tensor([case.sink_values[head % len(case.sink_values)] for head in range(case.heads)])


def _fill(sizes: tuple[int, ...], case: Case, generator: torch.Generator) -> Tensor:
    if case.strided:
        # Every other entry of a tensor whose first two dims are swapped and whose last is too wide.
        wide = torch.randn(sizes[1], 2 * sizes[0], *sizes[2:-1], sizes[-1] + 3, generator=generator)
        return wide.transpose(0, 1)[::2, ..., : sizes[-1]]
    if case.content == "tied":
        return torch.randint(-2, 3, sizes, generator=generator).float()
    values = torch.randn(sizes, generator=generator)
    if case.content == "poisoned":
        draw = torch.rand(sizes, generator=generator)
        for value, low in ((torch.nan, 0.0), (torch.inf, 0.004), (-torch.inf, 0.008)):
            values[(draw >= low) & (draw < low + 0.004)] = value
    return values
