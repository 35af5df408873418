"""Attention of neighbouring queries as one tile over the union of their selections, in Triton.

With few heads on a KV head, a query by itself fills a corner of a matrix tile and reads every selected row for these
few heads alone. Neighbouring queries select much the same tokens: a block of them, `R` heads each, makes a full tile,
and a row that any of them selected is gathered once. `mark` notes in a table which queries of a block selected a token
(one bit each), `collect` packs the tokens that any selected into a list, and `attend_union` walks over the list. Each
is a launch of its own, so that no program reads what another is still writing.

A block is flagged, and left to `triton_forward.attend`, where its union is too long to pay, where a query selected a
token twice, which one bit cannot say, or where a value is not finite, which would reach the neighbours as `0 * NaN`.

Shapes: as in `triton_forward.py`, and `N` blocks of queries.
"""

# A kernel has no types to annotate, and grows its tuples of tiles by the one form that Triton compiles.
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from dsa.ops.triton_tiles import (
    LN_2,
    LOG2_E,
    dot,
    dot_rows,
    finite_or_zero,
    load_parts,
    store_part,
    tanh,
    zero_parts,
)


@triton.jit
def mark(
    indices,
    table,
    flags,
    i_strides,
    tokens,
    keys,
    selected,
    blocks_of_row,
    first_block,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sets bit `j` of the int32 `table[N, S]` for every token that query `j` of a block selected."""
    i_batch, i_token, i_place = i_strides
    block = first_block + tl.program_id(0)
    query = tl.program_id(1)
    batch = (block // blocks_of_row).to(tl.int64)
    token = block % blocks_of_row * QUERIES + query
    row = indices + batch * i_batch + token.to(tl.int64) * i_token
    cells = table + tl.program_id(0).to(tl.int64) * keys
    bit = tl.full([BLOCK], 1, tl.int32) << query
    end = tl.where(token < tokens, selected, 0)
    twice = 0
    for start in tl.range(0, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        index = tl.load(row + place * i_place, mask=place < end, other=-1)
        valid = (index >= 0) & (index < keys)
        before = tl.atomic_or(cells + index, bit, mask=valid, sem="relaxed")
        twice = tl.maximum(twice, tl.max(tl.where(valid & ((before & bit) != 0), 1, 0), axis=0))
    if twice > 0:
        tl.store(flags + block, 1)


@triton.jit
def collect(table, positions, members, counts, flags, keys, capacity, first_block, BLOCK: tl.constexpr):
    """Packs the marked tokens of each block, ascending, with their bits: `positions` and `members` `[N, capacity]`."""
    here = tl.program_id(0).to(tl.int64)
    count = 0
    for start in tl.range(0, keys, BLOCK):
        position = start + tl.arange(0, BLOCK)
        bits = tl.load(table + here * keys + position, mask=position < keys, other=0)
        marked = tl.where(bits != 0, 1, 0)
        slot = count + tl.cumsum(marked, axis=0) - 1
        kept = (bits != 0) & (slot < capacity)
        tl.store(positions + here * capacity + slot, position, mask=kept)
        tl.store(members + here * capacity + slot, bits, mask=kept)
        count += tl.sum(marked, axis=0)
    tl.store(counts + here, count)
    if count > capacity:
        tl.store(flags + first_block + here, 1)


@triton.jit
def attend_union(
    q,
    k,
    v,
    positions,
    members,
    counts,
    flags,
    sink_logits,
    out,
    lse,
    q_strides,
    k_strides,
    v_strides,
    tokens,
    keys,
    capacity,
    blocks_of_row,
    first_block,
    scale,
    softcap,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_OFFSETS: tl.constexpr,
    V_WIDTHS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED_SHARED: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes `out[B, T, H, Dv]` and `lse[B, T, H]` of the blocks that are not flagged.

    A block that turns out to hold a value that is not finite is flagged here; then what is written does not matter.
    """
    q_batch, q_token, q_head, q_dim = q_strides
    k_batch, k_token, k_head, k_dim = k_strides
    v_batch, v_token, v_head, v_dim = v_strides
    SHARED: tl.constexpr = HEADS // GROUPS
    ROWS: tl.constexpr = QUERIES * PADDED_SHARED
    group = tl.program_id(0) % GROUPS
    here = (tl.program_id(0) // GROUPS).to(tl.int64)
    block = first_block + here
    batch = block // blocks_of_row
    row = tl.arange(0, ROWS)
    query = row // PADDED_SHARED
    token = block % blocks_of_row * QUERIES + query
    shared_head = row % PADDED_SHARED
    handled = tl.load(flags + block) == 0
    count = tl.where(handled, tl.load(counts + here), 0)
    real = (shared_head < SHARED) & (token < tl.where(handled, tokens, 0))
    head = group * SHARED + shared_head
    q_rows = q + batch * q_batch + token * q_token + head.to(tl.int64) * q_head
    queries = load_parts(q_rows, real, q_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
    k_base = k + batch * k_batch + group.to(tl.int64) * k_head
    v_base = v + batch * v_batch + group.to(tl.int64) * v_head
    positions += here * capacity
    members += here * capacity

    factor = scale / softcap if HAS_SOFTCAP else scale * LOG2_E
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    mixed = zero_parts(ROWS, V_WIDTHS)
    place = tl.arange(0, BLOCK_KEYS)
    position = tl.load(positions + place, mask=place < count, other=0)
    bits = tl.load(members + place, mask=place < count, other=0)
    for start in tl.range(0, count, BLOCK_KEYS, num_stages=STAGES):
        place = start + BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        next_position = tl.load(positions + place, mask=place < count, other=0)
        next_bits = tl.load(members + place, mask=place < count, other=0)
        valid = bits != 0
        wide = position.to(tl.int64)
        key_parts = load_parts(k_base + wide * k_token, valid, k_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
        value_parts = load_parts(v_base + wide * v_token, valid, v_dim, V_SIZE, V_OFFSETS, V_WIDTHS, DTYPE)
        scores = dot_rows(queries, key_parts, factor, ROWS, BLOCK_KEYS, len(WIDTHS), PRECISION)
        if HAS_SOFTCAP:
            scores = tanh(scores) * (softcap * LOG2_E)
        member = ((bits[None, :] >> query[:, None]) & 1) != 0
        scores = tl.where(member, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shift = finite_or_zero(new_top)
        shrink = tl.exp2(top - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        weights = weights.to(DTYPE)
        grown = ()
        for i in tl.static_range(len(V_WIDTHS)):
            grown = grown + (dot(weights, value_parts[i], mixed[i] * shrink[:, None], PRECISION),)
        mixed = grown
        top = new_top
        position = next_position
        bits = next_bits

    broken = 0
    for i in tl.static_range(len(V_WIDTHS)):
        broken = tl.maximum(broken, tl.max(tl.max(tl.where(mixed[i] != mixed[i], 1, 0), axis=1), axis=0))
    if broken > 0:
        tl.store(flags + block, 1)
    shift = finite_or_zero(top)
    log_total = (tl.log2(total) + shift) * LN_2
    # Of nothing but a sink, the sum may be subnormal, and its reciprocal infinite.
    nothing = total == 0.0
    if HAS_SINK:
        sink = tl.load(sink_logits + head, mask=real, other=float("-inf")).to(tl.float32)
        total += tl.exp2(sink * LOG2_E - shift)
    inverse = 1.0 / tl.where(nothing, 1.0, total)
    out_row = (batch * tokens + token) * HEADS + head
    tl.store(lse + out_row, log_total, mask=real)
    for i in tl.static_range(len(V_WIDTHS)):
        part = mixed[i] * inverse[:, None]
        store_part(out + out_row * V_SIZE, real, part, V_SIZE, V_OFFSETS[i], V_WIDTHS[i])
