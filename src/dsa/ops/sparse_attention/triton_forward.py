"""Forward kernels of `sparse_attention` in Triton: gather, attend, and the merge of a split selection.

One program owns one query token and up to `BLOCK_HEADS` query heads of one KV head, and walks over that token's
selection in tiles of `BLOCK_KEYS` gathered rows. Every gathered row serves all those heads at once; where the values
are the first columns of the keys (MLA) it also serves both products, so that it is read once. Few queries are split
over parts of their selection, and `merge_splits` joins the parts.

The softmax is computed in base 2. An index outside `[0, S)` counts as -1, so nothing outside a tensor is ever read.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values,
`K` selected tokens, `R = H / G` query heads that share a KV head, `X` splits.
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
    count_used,
    dot,
    dot_rows,
    finite_or_zero,
    load_parts,
    store_part,
    tanh,
    zero_parts,
)


@triton.jit
def attend(
    q,
    k,
    v,
    indices,
    sink_logits,
    flags,
    out,
    lse,
    q_strides,
    k_strides,
    v_strides,
    i_strides,
    tokens,
    keys,
    selected,
    per_split,
    rows,
    blocks_of_row,
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
    VALUES_IN_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    FLAGGED_QUERIES: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes `out[X, B * T, H, Dv]` and `lse[X, B * T, H]`, contiguous.

    With one split these are the results. With several, `out` is fp32 and each part normalised by itself, and `lse`
    is in base 2 and leaves out the sink: `merge_splits` does the rest.

    With `FLAGGED_QUERIES` above zero only the blocks of that many queries are computed whose `flags` are set: the
    others are done already (see `triton_shared.py`).
    """
    q_batch, q_token, q_head, q_dim = q_strides
    k_batch, k_token, k_head, k_dim = k_strides
    v_batch, v_token, v_head, v_dim = v_strides
    i_batch, i_token, i_place = i_strides
    SHARED: tl.constexpr = HEADS // GROUPS
    HEAD_BLOCKS: tl.constexpr = (SHARED + BLOCK_HEADS - 1) // BLOCK_HEADS
    # Programs that read the same rows run side by side, so that the rows are in the L2 for all but the first.
    program = tl.program_id(0)
    head_block = program % HEAD_BLOCKS
    group = program // HEAD_BLOCKS % GROUPS
    split = program // (HEAD_BLOCKS * GROUPS) % SPLITS
    row = program // (HEAD_BLOCKS * GROUPS * SPLITS)
    batch = (row // tokens).to(tl.int64)
    token = (row % tokens).to(tl.int64)

    local_head = head_block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    real_head = local_head < SHARED
    stop = selected
    if FLAGGED_QUERIES > 0:
        wanted = tl.load(flags + batch * blocks_of_row + token // FLAGGED_QUERIES) != 0
        real_head = local_head < tl.where(wanted, SHARED, 0)
        stop = tl.where(wanted, selected, 0)
    head = group * SHARED + local_head
    q_rows = q + batch * q_batch + token * q_token + head.to(tl.int64) * q_head
    queries = load_parts(q_rows, real_head, q_dim, SIZE, OFFSETS, WIDTHS, DTYPE)

    k_base = k + batch * k_batch + group.to(tl.int64) * k_head
    v_base = v + batch * v_batch + group.to(tl.int64) * v_head
    i_base = indices + batch * i_batch + token * i_token
    begin = split * per_split
    end = count_used(i_base, i_place, begin, tl.minimum(begin + per_split, stop), keys, 1024)

    factor = scale / softcap if HAS_SOFTCAP else scale * LOG2_E
    top = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.full([BLOCK_HEADS], 0.0, tl.float32)
    mixed = zero_parts(BLOCK_HEADS, V_WIDTHS)
    place = begin + tl.arange(0, BLOCK_KEYS)
    index = tl.load(i_base + place * i_place, mask=place < end, other=-1)
    for start in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
        # The next tile's indices are read by hand, so that every stage of the loop's pipeline holds gathered rows.
        place = start + BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        next_index = tl.load(i_base + place * i_place, mask=place < end, other=-1)
        valid = (index >= 0) & (index < keys)
        position = index.to(tl.int64)
        key_parts = load_parts(k_base + position * k_token, valid, k_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
        if VALUES_IN_KEYS:
            value_parts = key_parts
        else:
            value_parts = load_parts(v_base + position * v_token, valid, v_dim, V_SIZE, V_OFFSETS, V_WIDTHS, DTYPE)
        scores = dot_rows(queries, key_parts, factor, BLOCK_HEADS, BLOCK_KEYS, len(WIDTHS), PRECISION)
        new_top, shrink, weights = top, total, scores
        # Always taken. The branch keeps the compiler from seeing that one product feeds the other, for which it would
        # give each warp whole rows: on SM90 two warp groups would then compute the same 64 rows of scores twice.
        if keys > 0:
            if HAS_SOFTCAP:
                scores = tanh(scores) * (softcap * LOG2_E)
            scores = tl.where(valid[None, :], scores, float("-inf"))
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
        index = next_index

    shift = finite_or_zero(top)
    log_total = tl.log2(total) + shift
    # Of nothing but a sink, the sum may be subnormal, and its reciprocal infinite.
    nothing = total == 0.0
    if HAS_SINK and SPLITS == 1:
        sink = tl.load(sink_logits + head, mask=real_head, other=float("-inf")).to(tl.float32)
        total += tl.exp2(sink * LOG2_E - shift)
    if SPLITS == 1:
        log_total *= LN_2
    inverse = 1.0 / tl.where(nothing, 1.0, total)
    out_row = (split * rows + row).to(tl.int64) * HEADS + head
    tl.store(lse + out_row, log_total, mask=real_head)
    for i in tl.static_range(len(V_WIDTHS)):
        part = mixed[i] * inverse[:, None]
        store_part(out + out_row * V_SIZE, real_head, part, V_SIZE, V_OFFSETS[i], V_WIDTHS[i])


@triton.jit
def merge_splits(
    parts,
    logs,
    sink_logits,
    out,
    lse,
    rows,
    HEADS: tl.constexpr,
    V_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Joins `parts[X, B * T, H, Dv]` by `logs[X, B * T, H]` (base 2) into `out[B * T, H, Dv]`, `lse[B * T, H]`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, PADDED_SPLITS)
    part_row = split.to(tl.int64) * rows * HEADS + row
    log = tl.load(logs + part_row, mask=split < SPLITS, other=float("-inf"))
    # The maximum passes over a NaN, which the sum below brings back.
    shift = finite_or_zero(tl.max(log, axis=0))
    weight = tl.exp2(log - shift)
    total = tl.sum(weight, axis=0)
    log_total = (tl.log2(total) + shift) * LN_2
    # Of nothing but a sink, the sum may be subnormal, and its reciprocal infinite.
    nothing = total == 0.0
    if HAS_SINK:
        sink = tl.load(sink_logits + row % HEADS).to(tl.float32)
        total += tl.exp2(sink * LOG2_E - shift)
    mask = (split < SPLITS)[:, None] & (column < V_SIZE)[None, :]
    part = tl.load(parts + part_row[:, None] * V_SIZE + column[None, :], mask=mask, other=0.0)
    mixed = tl.sum(part * weight[:, None], axis=0) / tl.where(nothing, 1.0, total)
    tl.store(out + row * V_SIZE + column, mixed.to(out.dtype.element_ty), mask=column < V_SIZE)
    if tl.program_id(1) == 0:
        tl.store(lse + row, log_total)
