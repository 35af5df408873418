"""The three Triton kernels of `index_topk`; `triton.py` says how they work together.

A score becomes an int32 in the order of the scores (an ordered key): `-0.0` equals `0.0`, NaN lies below every
number, the lowest integer marks a hidden token and the highest one that must be selected. Tokens are handled from the
newest to the oldest, so that among equal ordered keys the first one met wins. A candidate is a pair of ordered key and
position, the halves of an int64.

Shapes: `B` batch, `T` query tokens of the launch, `S` key tokens, `Hi`/`Di` index heads / index head dim, `K` top-k;
`n` tokens and `s` keys of one tile. A row is one query, `b * T + t`.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from dsa.ops.triton_tiles import decode_e4m3

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_HIDDEN = tl.constexpr(-(2**31))
_NOT_A_NUMBER = tl.constexpr(-(2**31) + 1)
_FORCED = tl.constexpr(2**31 - 1)
_BEYOND = tl.constexpr(2**31 - 1)

# The integer v < 2**23 as the low bits of this fp32 number makes it 2**23 + v.
_INTEGER_BITS = tl.constexpr(0x4B000000)
_INTEGER_FLOAT = tl.constexpr(8388608.0)


@triton.jit
def _as_operand(x, KIND: tl.constexpr):
    """Brings loaded queries or keys into the type in which they are multiplied."""
    if KIND == "fp8_as_fp16":
        x = decode_e4m3(x)
    elif KIND == "fp32":
        x = x.to(tl.float32)
    return x


@triton.jit
def _relu_products(query, key, KIND: tl.constexpr):
    """fp32 `relu(query[n, Di] . key[Di, s])`."""
    if KIND == "int8":
        # Exact, and much cheaper than a conversion instruction: |dot| <= 127 * 63 * Di < 2**23.
        dots = tl.maximum(tl.dot(query, key, out_dtype=tl.int32), 0)
        relu = (dots | _INTEGER_BITS).to(tl.float32, bitcast=True) - _INTEGER_FLOAT
    else:
        dots = tl.dot(query, key, input_precision="ieee")
        if KIND == "fp8_as_fp16":
            dots = dots * 65536.0
        relu = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return relu


@triton.jit
def _ordered_keys(scores):
    """int32 in the order of fp32 scores."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return tl.where(scores != scores, _NOT_A_NUMBER, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _store_above(pointers, ordered, position, bound):
    """Scattered stores of the pairs above a bound, from where the matrix product leaves them.

    `tl.store` would first move pointers, pairs and mask through shared memory into a layout for contiguous stores,
    which costs more than the selection itself.
    """
    if _INTERPRETED:
        pair = (ordered.to(tl.int64) << 32) | position.to(tl.int64)
        tl.store(pointers, pair, mask=ordered > bound)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $3, $4; @p st.global.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0; }",
            "=r,l,r,r,r",
            [pointers.to(tl.int64), position, ordered, bound],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _block_extent(first_ptr, last_ptr, batch, block, tokens, BLOCK_M: tl.constexpr):
    """What the queries of a block see: first and one past the last key of each, lowest and highest of all."""
    token = block * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.load(first_ptr + batch * tokens + token, mask=token < tokens, other=0)
    last = tl.load(last_ptr + batch * tokens + token, mask=token < tokens, other=0)
    lowest = tl.min(tl.where(last > first, first, _BEYOND))
    return first, last, lowest, tl.max(last)


@triton.jit
def score_kernel(
    q_ptr,
    k_ptr,
    coefficient_ptr,
    key_scale_ptr,
    table_ptr,
    first_ptr,
    last_ptr,
    bound_ptr,
    dense_ptr,
    candidate_ptr,
    count_ptr,
    q_strides,
    k_strides,
    scale_strides,
    table_strides,
    pages,
    tokens,
    round_begin,
    round_end,
    segment_keys,
    sinks,
    local,
    dense_capacity,
    capacity,
    counts_per_row,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    PAGE: tl.constexpr,
    FILTER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores a block of queries against one segment of keys, counted back from the newest that the block sees.

    `score = (sum over heads in order of coefficient * relu(q . k)) * key_scale`. With `FILTER`, what lies above
    the row's bound is appended to the segment of the row, newest first, and counted. Without, the ordered key of
    every token is stored at its distance from the newest, hidden ones included.

    With `PAGE` above zero, keys and scales lie in a pool of `pages` pages of so many tokens, their first strides are
    those of a page, and the table says which page holds a block of tokens. A page outside the pool is not read: its
    tokens score 0.

    Grid: segments, blocks of queries, `B`.
    """
    stride_qb, stride_qt, stride_qh, stride_qd = q_strides
    stride_kb, stride_ks, stride_kd = k_strides
    stride_sb, stride_ss = scale_strides
    stride_tb, stride_te = table_strides
    segment, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last, lowest, highest = _block_extent(first_ptr, last_ptr, batch, block, tokens, BLOCK_M)
    token = block * BLOCK_M + tl.arange(0, BLOCK_M)
    present = token < tokens
    row = batch * tokens + token
    begin = round_begin + segment * segment_keys
    end = tl.minimum(tl.minimum(begin + segment_keys, round_end), highest - lowest)

    dim = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_N)
    q_base = q_ptr + batch.to(tl.int64) * stride_qb + block.to(tl.int64) * BLOCK_M * stride_qt
    q_offsets = (tl.arange(0, BLOCK_M) * stride_qt)[:, None] + (dim * stride_qd)[None, :]
    q_mask = present[:, None] & (dim < DIM)[None, :]
    coefficient_ptrs = coefficient_ptr + batch.to(tl.int64) * HEADS * tokens + token
    if PAGE > 0:
        table_ptr += batch.to(tl.int64) * stride_tb
    else:
        k_ptr += batch.to(tl.int64) * stride_kb
        key_scale_ptr += batch.to(tl.int64) * stride_sb
    kept = row * capacity + segment * segment_keys
    filled = tl.zeros([BLOCK_M], tl.int32)
    if FILTER:
        bound = tl.load(bound_ptr + row, mask=present, other=_FORCED)
        no_later = (column[:, None] <= column[None, :]).to(tl.float16)
    latest_start = tl.max(first)
    earliest_end = tl.min(tl.where(present, last, _BEYOND))

    for distance in range(begin, end, BLOCK_N):
        position = highest - 1 - distance - column
        exists = position >= lowest
        readable = exists
        k_place = position.to(tl.int64) * stride_ks
        s_place = position.to(tl.int64) * stride_ss
        if PAGE > 0:
            page = tl.load(table_ptr + position // PAGE * stride_te, mask=exists, other=-1)
            readable = exists & (page >= 0) & (page < pages)
            k_place = page.to(tl.int64) * stride_kb + position % PAGE * stride_ks
            s_place = page.to(tl.int64) * stride_sb + position % PAGE * stride_ss
        k_offsets = k_place[:, None] + (dim * stride_kd)[None, :]
        key = tl.load(k_ptr + k_offsets, mask=readable[:, None] & (dim < DIM)[None, :], other=0.0)
        key = tl.trans(_as_operand(key, KIND))
        score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for head in tl.range(HEADS, num_stages=STAGES):
            query = tl.load(q_base + head * stride_qh + q_offsets, mask=q_mask, other=0.0)
            coefficient = tl.load(coefficient_ptrs + head * tokens, mask=present, other=0.0)
            score += _relu_products(_as_operand(query, KIND), key, KIND) * coefficient[:, None]
        if SCALED:
            key_scale = tl.load(key_scale_ptr + s_place, mask=readable, other=0.0)
            score *= key_scale[None, :]

        ordered = _ordered_keys(score)
        newest = highest - distance
        if (newest - BLOCK_N < latest_start + sinks) | (newest > earliest_end - local):
            after_first = position[None, :] - first[:, None]
            before_last = last[:, None] - position[None, :]
            ordered = tl.where((after_first < sinks) | (before_last <= local), _FORCED, ordered)
            ordered = tl.where((after_first < 0) | (before_last <= 0), _HIDDEN, ordered)
        if FILTER:
            passes = ordered > bound[:, None]
            # A matrix product counts along the rows and, unlike a scan, leaves the layout as it is.
            upto = tl.dot(tl.where(passes, 1.0, 0.0).to(tl.float16), no_later)
            rank = (upto + _INTEGER_FLOAT).to(tl.int32, bitcast=True) & 0x7FFFFF
            place = (kept + filled)[:, None] + rank - 1
            _store_above(candidate_ptr + place, ordered, position[None, :], bound[:, None])
            filled += tl.sum(passes.to(tl.int32), axis=1)
        else:
            place = row[:, None] * dense_capacity + (distance - round_begin + column)[None, :]
            tl.store(dense_ptr + place, ordered, mask=present[:, None] & exists[None, :])
    if FILTER:
        tl.store(count_ptr + row * counts_per_row + 1 + segment, filled, mask=present)


@triton.jit
def _candidates(source_ptr, index, total, count_ptr, first_place, later_place, spacing, segments, DENSE: tl.constexpr):
    """Ordered keys and positions of the candidates number `index`, of segment 0, then of the next, ...

    A dense round stores no positions: 0.
    """
    place = first_place + index
    if DENSE:
        ordered = tl.load(source_ptr + place, mask=index < total, other=_HIDDEN)
        position = tl.zeros_like(index)
    else:
        before = tl.load(count_ptr)
        for segment in range(1, segments):
            start = later_place + (segment - 1) * spacing
            place = tl.where(index >= before, start + index - before, place)
            before += tl.load(count_ptr + segment)
        pair = tl.load(source_ptr + place, mask=index < total, other=0)
        ordered = tl.where(index < total, (pair >> 32).to(tl.int32), _HIDDEN)
        position = pair.to(tl.int32)
    return ordered, position


@triton.jit
def _keep(target_ptr, selection_ptr, ordered, position, bound, crowded, room, met, written, top_k, FINAL: tl.constexpr):
    """Stores the chosen ones of a block of candidates: those above the bound and, in order, those equal to it.

    Where equal ones are too many (`crowded`), only `room` of them are chosen, of which `met` have been met before.

    Returns:
        `met` and `written`, counted on.
    """
    chosen = ordered >= bound
    if crowded:
        equal = (ordered == bound).to(tl.int32)
        chosen = chosen & ((equal == 0) | (met + tl.cumsum(equal, axis=0) <= room))
        met += tl.sum(equal)
    rank = written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    if FINAL:
        tl.store(selection_ptr + (top_k - 1 - rank), position, mask=chosen)
    else:
        pair = (ordered.to(tl.int64) << 32) | position.to(tl.int64)
        tl.store(target_ptr + rank, pair, mask=chosen)
    return met, written + tl.sum(chosen.to(tl.int32))


@triton.jit
def select_kernel(
    source_ptr,
    target_ptr,
    count_in_ptr,
    count_out_ptr,
    first_ptr,
    last_ptr,
    bound_ptr,
    selection_ptr,
    tokens,
    top_k,
    source_capacity,
    target_capacity,
    dense_keys,
    group_keys,
    first_place,
    later_place,
    spacing,
    segments,
    target_place,
    counts_in_per_row,
    counts_out_per_row,
    stride_ob,
    DENSE: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Keeps the `K` highest of a row's candidates, in order, and stores a bound that later ones must exceed.

    The source: with `DENSE` a stored round, int32, of which a group takes `group_keys` tokens; else pairs in
    `segments` segments, the first at `first_place`, the others at `later_place` and every `spacing` after it.
    The kept ones go to `target_place` of the row, or with `FINAL` to the selection, oldest first.

    Grid: groups, `T`, `B`. Group `g` of a row reads and writes `g` times the size of a group further on.
    """
    group, token, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (batch * tokens + token).to(tl.int64)
    if tl.load(last_ptr + row) <= tl.load(first_ptr + row):
        return
    source_ptr += row * source_capacity
    target_ptr += row * target_capacity + target_place + group * top_k
    selection_ptr += batch.to(tl.int64) * stride_ob + token.to(tl.int64) * top_k
    count_in_ptr += row * counts_in_per_row + group * segments
    newest = 0
    total = 0
    if DENSE:
        _starts, _ends, lowest, highest = _block_extent(first_ptr, last_ptr, batch, token // BLOCK_M, tokens, BLOCK_M)
        first_place = group * group_keys
        newest = highest - 1 - first_place
        total = tl.minimum(group_keys, tl.minimum(dense_keys, highest - lowest) - first_place)
    else:
        first_place += group * group_keys
        later_place += group * group_keys
        for segment in range(segments):
            total += tl.load(count_in_ptr + segment)

    index = tl.arange(0, BLOCK)
    # The first block stays in registers; only rows with more candidates read the rest again and again.
    head, head_position = _candidates(
        source_ptr, index, total, count_in_ptr, first_place, later_place, spacing, segments, DENSE
    )
    visible = tl.sum((head > _HIDDEN).to(tl.int32))
    for start in range(BLOCK, total, BLOCK):
        more, _ = _candidates(
            source_ptr, start + index, total, count_in_ptr, first_place, later_place, spacing, segments, DENSE
        )
        visible += tl.sum((more > _HIDDEN).to(tl.int32))

    # Bit by bit the highest bound that K candidates reach; any that exactly K reach will do.
    bound = tl.full((), _HIDDEN, tl.int32)
    reaching = visible
    bit = 31
    while (bit >= 0) & (reaching > top_k):
        trial = bound ^ (tl.full((), 1, tl.int32) << bit)
        enough = tl.sum((head >= trial).to(tl.int32))
        for start in range(BLOCK, total, BLOCK):
            more, _ = _candidates(
                source_ptr, start + index, total, count_in_ptr, first_place, later_place, spacing, segments, DENSE
            )
            enough += tl.sum((more >= trial).to(tl.int32))
        if enough >= top_k:
            bound = trial
            reaching = enough
        bit -= 1

    # With K candidates or fewer all that are visible stay; a bound that K reach is known only once there are more.
    lowest_kept = tl.maximum(bound, _HIDDEN + 1)
    crowded = reaching > top_k
    room = 0
    if crowded:
        above = tl.sum((head > bound).to(tl.int32))
        for start in range(BLOCK, total, BLOCK):
            more, _ = _candidates(
                source_ptr, start + index, total, count_in_ptr, first_place, later_place, spacing, segments, DENSE
            )
            above += tl.sum((more > bound).to(tl.int32))
        room = top_k - above

    if DENSE:
        head_position = newest - index
    none = tl.full((), 0, tl.int32)
    met, written = _keep(
        target_ptr, selection_ptr, head, head_position, lowest_kept, crowded, room, none, none, top_k, FINAL
    )
    for start in range(BLOCK, total, BLOCK):
        more, position = _candidates(
            source_ptr, start + index, total, count_in_ptr, first_place, later_place, spacing, segments, DENSE
        )
        if DENSE:
            position = newest - start - index
        met, written = _keep(
            target_ptr, selection_ptr, more, position, lowest_kept, crowded, room, met, written, top_k, FINAL
        )
    if not FINAL:
        tl.store(count_out_ptr + row * counts_out_per_row + group, written)
        tl.store(bound_ptr + row, bound)


@triton.jit
def fill_kernel(start_ptr, end_ptr, selection_ptr, top_k, start_strides, end_strides, stride_ob, BLOCK: tl.constexpr):
    """Selects everything for the queries that see at most `K` tokens, and pads with `-1`. Grid: `T`, `B`."""
    stride_sb, stride_st = start_strides
    stride_eb, stride_et = end_strides
    token, batch = tl.program_id(0), tl.program_id(1)
    start = tl.load(start_ptr + batch * stride_sb + token * stride_st)
    end = tl.load(end_ptr + batch * stride_eb + token * stride_et)
    if end - start <= top_k:
        selection_ptr += batch.to(tl.int64) * stride_ob + token.to(tl.int64) * top_k
        for column in range(0, top_k, BLOCK):
            place = column + tl.arange(0, BLOCK)
            position = tl.where(start + place < end, start + place, -1).to(tl.int32)
            tl.store(selection_ptr + place, position, mask=place < top_k)
