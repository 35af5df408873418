"""Attention over FP8 rows of latent attention in Triton: rows of bytes are gathered where they lie and decoded on the
way to the matrix units.

One program owns one query token and up to `BLOCK_HEADS` heads, as in `triton_forward.py`, and shares its merge of a
split selection. A row is cut at its groups of 128 latent dims, each with its own scale. The codes themselves are
multiplied, which is exact in any tile's dtype: scores take the scale afterwards, and weights before they meet the
values, so that a scale costs one multiplication a key and head, and none an element. Rows in pages are found through
the block table, one tile ahead of the loads that need it.

An index outside `[0, S)`, and one whose page lies outside the pool, counts as -1: nothing outside a tensor is read.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H` heads, `L`/`R` latent / rotated dims, `K` selected tokens,
`P` pages, `N` entries of a table's row, `X` splits.
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
    decode_e4m3,
    dot,
    finite_or_zero,
    load_parts,
    store_part,
    tanh,
    zero_parts,
)


@triton.jit
def _place_of(index, valid, table, t_entry, pages, PAGE: tl.constexpr):
    """Where tokens lie in the pool, and whether they do; without pages (`PAGE` 0) a token's place is its position."""
    place = index.to(tl.int64)
    if PAGE > 0:
        page = tl.load(table + (index // PAGE) * t_entry, mask=valid, other=-1)
        valid = valid & (page >= 0) & (page < pages)
        place = page.to(tl.int64) * PAGE + index % PAGE
    return place, valid


@triton.jit
def _load_codes(rows, valid, SIZE: tl.constexpr, OFFSET: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """One part of the rows `[n, SIZE]` of e4m3 numbers, or of their bytes (then divided by 256); 0 where not valid."""
    columns = OFFSET + tl.arange(0, WIDTH)
    mask = valid[:, None]
    if OFFSET + WIDTH > SIZE:
        mask = mask & (columns < SIZE)[None, :]
    tile = tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0)
    if rows.dtype.element_ty == tl.uint8:
        number = tl.where((tile & 0x7F) == 0x7F, float("nan"), decode_e4m3(tile)).to(DTYPE)
    else:
        number = tile.to(DTYPE)
    return number


@triton.jit
def attend_packed(
    q,
    codes,
    scales,
    rotated,
    indices,
    table,
    sink_logits,
    out,
    lse,
    q_strides,
    c_strides,
    s_strides,
    r_strides,
    i_strides,
    t_strides,
    tokens,
    keys,
    pages,
    selected,
    per_split,
    rows,
    scale,
    softcap,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_OFFSETS: tl.constexpr,
    ROPE_WIDTHS: tl.constexpr,
    PAGE: tl.constexpr,
    CODE_FACTOR: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes `out[X, B * T, H, L]` and `lse[X, B * T, H]`, contiguous; the splits are those of `attend`.

    `codes[B, S, L]`, fp32 `scales[B, S, L / GROUP]` and bf16 `rotated[B, S, R]` are views of the same rows; with
    `PAGE` above zero of a pool `[P * PAGE, ...]` that all batch rows share. A code stands for `CODE_FACTOR` times the
    number that its bits make.
    """
    q_batch, q_token, q_head, q_dim = q_strides
    c_batch, c_token = c_strides
    s_batch, s_token = s_strides
    r_batch, r_token = r_strides
    i_batch, i_token, i_place = i_strides
    t_batch, t_entry = t_strides
    HEAD_BLOCKS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    # Programs that read the same rows run side by side, so that the rows are in the L2 for all but the first.
    program = tl.program_id(0)
    split = program // HEAD_BLOCKS % SPLITS
    row = program // (HEAD_BLOCKS * SPLITS)
    batch = (row // tokens).to(tl.int64)
    token = (row % tokens).to(tl.int64)
    head = program % HEAD_BLOCKS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    real_head = head < HEADS
    q_rows = q + batch * q_batch + token * q_token + head.to(tl.int64) * q_head
    queries = load_parts(q_rows, real_head, q_dim, LATENT, OFFSETS, WIDTHS, DTYPE)
    rotated_queries = load_parts(q_rows + LATENT * q_dim, real_head, q_dim, ROPE, ROPE_OFFSETS, ROPE_WIDTHS, DTYPE)

    codes += batch * c_batch
    scales += batch * s_batch
    rotated += batch * r_batch
    table += batch * t_batch
    i_base = indices + batch * i_batch + token * i_token
    begin = split * per_split
    end = count_used(i_base, i_place, begin, tl.minimum(begin + per_split, selected), keys, 1024)

    factor = scale / softcap if HAS_SOFTCAP else scale * LOG2_E
    top = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.full([BLOCK_HEADS], 0.0, tl.float32)
    mixed = zero_parts(BLOCK_HEADS, WIDTHS)
    place = begin + tl.arange(0, BLOCK_KEYS)
    index = tl.load(i_base + place * i_place, mask=place < end, other=-1)
    position, valid = _place_of(index, (index >= 0) & (index < keys), table, t_entry, pages, PAGE)
    for start in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
        # The next tile's indices are read by hand, so that every stage of the loop's pipeline holds gathered rows.
        place = start + BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        index = tl.load(i_base + place * i_place, mask=place < end, other=-1)
        next_position, next_valid = _place_of(index, (index >= 0) & (index < keys), table, t_entry, pages, PAGE)
        parts = ()
        part_scales = ()
        scores = tl.full([BLOCK_HEADS, BLOCK_KEYS], 0.0, tl.float32)
        none = tl.full([BLOCK_HEADS, BLOCK_KEYS], 0.0, tl.float32)
        for i in tl.static_range(len(WIDTHS)):
            part = _load_codes(codes + position * c_token, valid, LATENT, OFFSETS[i], WIDTHS[i], DTYPE)
            part_scale = tl.load(scales + position * s_token + OFFSETS[i] // GROUP, mask=valid, other=0.0)
            part_scale *= CODE_FACTOR
            # Each part's product is scaled by itself: see `dot_rows`.
            scores += dot(queries[i], tl.trans(part), none, PRECISION) * (part_scale * factor)[None, :]
            parts = parts + (part,)
            part_scales = part_scales + (part_scale,)
        turned = load_parts(rotated + position * r_token, valid, 1, ROPE, ROPE_OFFSETS, ROPE_WIDTHS, DTYPE)
        for i in tl.static_range(len(ROPE_WIDTHS)):
            scores += dot(rotated_queries[i], tl.trans(turned[i]), none, PRECISION) * factor
        new_top, shrink, weights = top, total, scores
        # Always taken: see the same branch in `attend`.
        if keys > 0:
            if HAS_SOFTCAP:
                scores = tanh(scores) * (softcap * LOG2_E)
            scores = tl.where(valid[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            shift = finite_or_zero(new_top)
            shrink = tl.exp2(top - shift)
            weights = tl.exp2(scores - shift[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
        grown = ()
        for i in tl.static_range(len(WIDTHS)):
            scaled = (weights * part_scales[i][None, :]).to(DTYPE)
            grown = grown + (dot(scaled, parts[i], mixed[i] * shrink[:, None], PRECISION),)
        mixed = grown
        top = new_top
        position = next_position
        valid = next_valid

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
    for i in tl.static_range(len(WIDTHS)):
        part = mixed[i] * inverse[:, None]
        store_part(out + out_row * LATENT, real_head, part, LATENT, OFFSETS[i], WIDTHS[i])
