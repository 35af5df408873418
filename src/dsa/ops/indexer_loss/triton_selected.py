"""Kernels of `indexer_loss` over selected keys (eq. 4): one program a query, which gathers its keys tile by tile.

The quantities are those of `triton_dense.py`. A selected key counts where it lies in the query's visible range, and is
compared where it lies in the part of it that is kept.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `H`/`G` query / KV heads,
`D` head dim, `K` selected tokens.
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
    add_part,
    dot,
    dot_rows,
    finite_or_zero,
    load_parts,
    tanh,
    zero_parts,
)


@triton.jit
def selected_totals(
    q,
    k,
    sink_logits,
    indices,
    visible_start,
    visible_end,
    kept_start,
    kept_end,
    log_totals,
    masses,
    q_strides,
    k_strides,
    i_strides,
    tokens,
    keys,
    selected,
    scale,
    softcap,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes `log_totals[B, H, T]`, base 2 and with the sink, and `masses[B, H, T]`."""
    q_batch, q_token, q_head, q_dim = q_strides
    k_batch, k_token, k_head, k_dim = k_strides
    i_batch, i_token, i_place = i_strides
    SHARED: tl.constexpr = HEADS // GROUPS
    HEAD_BLOCKS: tl.constexpr = (SHARED + BLOCK_HEADS - 1) // BLOCK_HEADS
    program = tl.program_id(0)
    group = program // HEAD_BLOCKS % GROUPS
    own = program // (HEAD_BLOCKS * GROUPS)
    batch = (own // tokens).to(tl.int64)
    token = (own % tokens).to(tl.int64)
    start, end = tl.load(visible_start + own), tl.load(visible_end + own)
    from_kept, to_kept = tl.load(kept_start + own), tl.load(kept_end + own)

    local_head = program % HEAD_BLOCKS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    real_head = local_head < SHARED
    head = group * SHARED + local_head
    q_rows = q + batch * q_batch + token * q_token + head.to(tl.int64) * q_head
    queries = load_parts(q_rows, real_head, q_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
    k_base = k + batch * k_batch + group.to(tl.int64) * k_head
    i_base = indices + batch * i_batch + token * i_token
    factor = scale / softcap if HAS_SOFTCAP else scale * LOG2_E
    top = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.full([BLOCK_HEADS], 0.0, tl.float32)
    kept_total = tl.full([BLOCK_HEADS], 0.0, tl.float32)
    compares = 0
    for first in tl.range(0, selected, BLOCK_KEYS, num_stages=STAGES):
        place = first + tl.arange(0, BLOCK_KEYS)
        index = tl.load(i_base + place * i_place, mask=place < selected, other=-1).to(tl.int64)
        seen = (index >= tl.maximum(start, 0)) & (index < tl.minimum(end, keys))
        compared = seen & (index >= from_kept) & (index < to_kept)
        rows = load_parts(k_base + index * k_token, seen, k_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
        scores = dot_rows(queries, rows, factor, BLOCK_HEADS, BLOCK_KEYS, len(WIDTHS), PRECISION)
        if HAS_SOFTCAP:
            scores = tanh(scores) * (softcap * LOG2_E)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shift = finite_or_zero(new_top)
        shrink = tl.exp2(top - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        kept_total = kept_total * shrink + tl.sum(tl.where(compared[None, :], weights, 0.0), axis=1)
        compares += tl.sum(compared.to(tl.int32), axis=0)
        top = new_top

    shift = finite_or_zero(top)
    if HAS_SINK:
        sink = tl.load(sink_logits + head, mask=real_head, other=float("-inf")).to(tl.float32)
        total += tl.exp2(sink * LOG2_E - shift)
    log_total = finite_or_zero(tl.log2(total) + shift)
    # Without scores above -infinity the denominator is the sink's term alone, whose reciprocal may be infinite.
    mass = tl.where(kept_total == 0.0, 0.0, kept_total * tl.exp2(shift - log_total))
    mine = (batch * HEADS + head) * tokens + token
    tl.store(log_totals + mine, log_total, mask=real_head)
    tl.store(masses + mine, tl.where(compares > 0, mass, 0.0), mask=real_head)


@triton.jit
def selected_divergence(
    q_index,
    k_index,
    w_index,
    q,
    k,
    indices,
    visible_start,
    visible_end,
    kept_start,
    kept_end,
    log_totals,
    masses,
    share,
    losses,
    grad_q,
    grad_k,
    grad_w,
    qi_strides,
    ki_strides,
    w_strides,
    q_strides,
    k_strides,
    i_strides,
    tokens,
    keys,
    selected,
    index_scale,
    scale,
    softcap,
    INDEX_HEADS: tl.constexpr,
    BLOCK_INDEX_HEADS: tl.constexpr,
    INDEX_SIZE: tl.constexpr,
    INDEX_OFFSETS: tl.constexpr,
    INDEX_WIDTHS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GRADIENTS: tl.constexpr,
    INDEX_DTYPE: tl.constexpr,
    INDEX_PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes `losses[B, T]`, `grad_q[B, T, Hi, Di]`, `grad_w[B, T, Hi]`; adds to the fp32 `grad_k[B, S, Di]`."""
    qi_batch, qi_token, qi_head, qi_dim = qi_strides
    ki_batch, ki_token, ki_dim = ki_strides
    w_batch, w_token, w_head = w_strides
    q_batch, q_token, q_head, q_dim = q_strides
    k_batch, k_token, k_head, k_dim = k_strides
    i_batch, i_token, i_place = i_strides
    SHARED: tl.constexpr = HEADS // GROUPS
    HEAD_BLOCKS: tl.constexpr = (SHARED + BLOCK_HEADS - 1) // BLOCK_HEADS
    own = tl.program_id(0)
    batch = (own // tokens).to(tl.int64)
    token = (own % tokens).to(tl.int64)
    mass = tl.load(masses + own)
    counted = mass != 0.0
    start, end = tl.load(visible_start + own), tl.load(visible_end + own)
    from_kept, to_kept = tl.load(kept_start + own), tl.load(kept_end + own)
    low = tl.maximum(tl.maximum(start, from_kept), 0)
    high = tl.minimum(tl.minimum(end, to_kept), keys)
    places = tl.where(counted, selected, 0)
    inverse_mass = 1.0 / tl.where(counted, mass, 1.0)
    grad_scale = tl.load(share)

    index_head = tl.arange(0, BLOCK_INDEX_HEADS)
    real = index_head < tl.where(counted, INDEX_HEADS, 0)
    qi_rows = q_index + batch * qi_batch + token * qi_token + index_head.to(tl.int64) * qi_head
    index_queries = load_parts(qi_rows, real, qi_dim, INDEX_SIZE, INDEX_OFFSETS, INDEX_WIDTHS, INDEX_DTYPE)
    w_row = w_index + batch * w_batch + token * w_token
    coefficient = tl.load(w_row + index_head * w_head, mask=real, other=0.0).to(tl.float32) * index_scale
    ki_base = k_index + batch * ki_batch
    i_base = indices + batch * i_batch + token * i_token

    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.full([1], 0.0, tl.float32)
    for first in tl.range(0, places, BLOCK_KEYS, num_stages=STAGES):
        place = first + tl.arange(0, BLOCK_KEYS)
        index = tl.load(i_base + place * i_place, mask=place < selected, other=-1).to(tl.int64)
        compared = (index >= low) & (index < high)
        index_keys = load_parts(
            ki_base + index * ki_token, compared, ki_dim, INDEX_SIZE, INDEX_OFFSETS, INDEX_WIDTHS, INDEX_DTYPE
        )
        dots = dot_rows(
            index_queries, index_keys, 1.0, BLOCK_INDEX_HEADS, BLOCK_KEYS, len(INDEX_WIDTHS), INDEX_PRECISION
        )
        scores = tl.sum(coefficient[:, None] * tl.where(dots < 0.0, 0.0, dots), axis=0)
        scores = tl.where(compared, scores * LOG2_E, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        shift = finite_or_zero(new_top)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(scores - shift), axis=0)
        top = new_top
    index_log_total = finite_or_zero(tl.log2(total) + finite_or_zero(top)) * LN_2

    factor = scale / softcap if HAS_SOFTCAP else scale * LOG2_E
    loss = tl.full([1], 0.0, tl.float32)
    grown_q = zero_parts(BLOCK_INDEX_HEADS, INDEX_WIDTHS)
    grown_w = tl.full([BLOCK_INDEX_HEADS], 0.0, tl.float32)
    q_base = q + batch * q_batch + token * q_token
    for first in tl.range(0, places, BLOCK_KEYS, num_stages=1):
        place = first + tl.arange(0, BLOCK_KEYS)
        index = tl.load(i_base + place * i_place, mask=place < selected, other=-1).to(tl.int64)
        compared = (index >= low) & (index < high)
        probability = tl.full([BLOCK_KEYS], 0.0, tl.float32)
        for block in tl.range(0, GROUPS * HEAD_BLOCKS, num_stages=STAGES):
            group = batch * 0 + block // HEAD_BLOCKS
            local_head = block % HEAD_BLOCKS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
            real_head = local_head < SHARED
            head = group * SHARED + local_head
            q_rows = q_base + head.to(tl.int64) * q_head
            queries = load_parts(q_rows, real_head, q_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
            k_rows = k + batch * k_batch + index * k_token + group * k_head
            rows = load_parts(k_rows, compared, k_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
            logits = dot_rows(queries, rows, factor, BLOCK_HEADS, BLOCK_KEYS, len(WIDTHS), PRECISION)
            if HAS_SOFTCAP:
                logits = tanh(logits) * (softcap * LOG2_E)
            log_total = tl.load(log_totals + (batch * HEADS + head) * tokens + token, mask=real_head, other=0.0)
            weights = tl.exp2(logits - log_total[:, None])
            probability += tl.sum(tl.where(real_head[:, None], weights, 0.0), axis=0)
        target = tl.where(compared, probability * inverse_mass, 0.0)

        index_keys = load_parts(
            ki_base + index * ki_token, compared, ki_dim, INDEX_SIZE, INDEX_OFFSETS, INDEX_WIDTHS, INDEX_DTYPE
        )
        dots = dot_rows(
            index_queries, index_keys, 1.0, BLOCK_INDEX_HEADS, BLOCK_KEYS, len(INDEX_WIDTHS), INDEX_PRECISION
        )
        scores = tl.sum(coefficient[:, None] * tl.where(dots < 0.0, 0.0, dots), axis=0)
        predicted = scores - index_log_total
        surprise = target * (tl.log2(tl.where(target > 0.0, target, 1.0)) * LN_2 - predicted)
        loss += tl.sum(tl.where(compared & (target != 0.0), surprise, 0.0), axis=0)
        if GRADIENTS:
            grad_scores = tl.where(compared, (tl.exp2(predicted * LOG2_E) - target) * grad_scale, 0.0)
            passed = tl.where(dots > 0.0, grad_scores[None, :], 0.0)
            grown_w += tl.sum(passed * dots, axis=1)
            weighted = (passed * coefficient[:, None]).to(INDEX_DTYPE)
            turned = tl.trans(weighted)
            k_targets = grad_k + (batch * keys + index) * INDEX_SIZE
            grown = ()
            for i in tl.static_range(len(INDEX_WIDTHS)):
                grown = grown + (dot(weighted, index_keys[i], grown_q[i], INDEX_PRECISION),)
                none = tl.full([BLOCK_KEYS, INDEX_WIDTHS[i]], 0.0, tl.float32)
                part = dot(turned, index_queries[i], none, INDEX_PRECISION)
                add_part(k_targets, compared, part, INDEX_SIZE, INDEX_OFFSETS[i], INDEX_WIDTHS[i])
            grown_q = grown

    tl.store(losses + own + tl.arange(0, 1), loss)
    if GRADIENTS:
        stored = index_head < INDEX_HEADS
        mine = own.to(tl.int64) * INDEX_HEADS + index_head
        tl.store(grad_w + mine, (grown_w * index_scale).to(grad_w.dtype.element_ty), mask=stored)
        for i in tl.static_range(len(INDEX_WIDTHS)):
            columns = INDEX_OFFSETS[i] + tl.arange(0, INDEX_WIDTHS[i])
            mask = stored[:, None] & (columns < INDEX_SIZE)[None, :]
            pointers = grad_q + mine[:, None] * INDEX_SIZE + columns[None, :]
            tl.store(pointers, grown_q[i].to(grad_q.dtype.element_ty), mask=mask)
