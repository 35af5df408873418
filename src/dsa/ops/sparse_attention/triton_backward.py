"""Backward kernels of `sparse_attention` in Triton.

One program owns the same query token and heads as in the forward pass, recomputes the probabilities from `lse`, keeps
its own gradient of the queries in registers, and brings the gradients of the rows it gathered to memory. Many queries
select the same key, so these meet: by default they are added atomically, in an order that varies. Where torch asks for
deterministic algorithms the program writes its contributions to a buffer instead, and `sum_by_key` adds them in the
order of the queries.

With `P` the probabilities (the sink in the denominator), `delta = sum_d out * grad_out` and `f` the softcap:
`grad_v[s] += P^T grad_out`, `grad_z = P * (grad_out v^T - delta) * f'(z)`, `grad_q = scale * grad_z k`,
`grad_k[s] += scale * grad_z^T q`, `grad_sink = -sum_t exp(sink - log total) * delta`.

Shapes: as in `triton_forward.py`.
"""

# A kernel has no types to annotate, and grows its tuples of tiles by the one form that Triton compiles.
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from dsa.ops.triton_tiles import (
    LOG2_E,
    add_part,
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
def attend_backward(
    q,
    k,
    v,
    indices,
    sink_logits,
    out,
    lse,
    grad_out,
    grad_q,
    grad_k,
    grad_v,
    delta,
    q_strides,
    k_strides,
    v_strides,
    i_strides,
    g_strides,
    tokens,
    keys,
    selected,
    first_row,
    first_group,
    scale,
    softcap,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_HERE: tl.constexpr,
    SIZE: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_OFFSETS: tl.constexpr,
    V_WIDTHS: tl.constexpr,
    VALUES_IN_KEYS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    WITH_KEYS: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes `grad_q[B, T, H, D]` and `delta[B, T, H]`, and brings the gradients of the gathered rows to memory.

    `grad_k` and `grad_v` are fp32. Added atomically they are `[B, S, GROUPS_HERE, D]` and zero at first; deterministic
    ones are `[programs, K, D]`. A launch covers the rows from `first_row` on, as many as the grid has, and the KV heads
    from `first_group` on, `GROUPS_HERE` of them. Without `WITH_KEYS` or `WITH_VALUES` it leaves out the gradients of
    keys and queries, or those of the values.
    """
    q_batch, q_token, q_head, q_dim = q_strides
    k_batch, k_token, k_head, k_dim = k_strides
    v_batch, v_token, v_head, v_dim = v_strides
    i_batch, i_token, i_place = i_strides
    g_batch, g_token, g_head, g_dim = g_strides
    SHARED: tl.constexpr = HEADS // GROUPS
    HEAD_BLOCKS: tl.constexpr = (SHARED + BLOCK_HEADS - 1) // BLOCK_HEADS
    program = tl.program_id(0)
    head_block = program % HEAD_BLOCKS
    group_here = program // HEAD_BLOCKS % GROUPS_HERE
    group = first_group + group_here
    row = first_row + program // (HEAD_BLOCKS * GROUPS_HERE)
    batch = (row // tokens).to(tl.int64)
    token = (row % tokens).to(tl.int64)

    local_head = head_block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    real_head = local_head < SHARED
    head = group * SHARED + local_head
    wide_head = head.to(tl.int64)
    q_rows = q + batch * q_batch + token * q_token + wide_head * q_head
    queries = load_parts(q_rows, real_head, q_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
    g_rows = grad_out + batch * g_batch + token * g_token + wide_head * g_head
    grads = load_parts(g_rows, real_head, g_dim, V_SIZE, V_OFFSETS, V_WIDTHS, DTYPE)
    own_row = row.to(tl.int64) * HEADS + head
    mean = tl.full([BLOCK_HEADS], 0.0, tl.float32)
    for i in tl.static_range(len(V_WIDTHS)):
        columns = V_OFFSETS[i] + tl.arange(0, V_WIDTHS[i])
        mask = real_head[:, None] & (columns < V_SIZE)[None, :]
        result = tl.load(out + own_row[:, None] * V_SIZE + columns[None, :], mask=mask, other=0.0)
        mean += tl.sum(result.to(tl.float32) * grads[i].to(tl.float32), axis=1)
    tl.store(delta + own_row, mean, mask=real_head)
    log_total = tl.load(lse + own_row, mask=real_head, other=float("-inf")) * LOG2_E
    if HAS_SINK:
        sink = tl.load(sink_logits + head, mask=real_head, other=float("-inf")).to(tl.float32) * LOG2_E
        larger = finite_or_zero(tl.maximum(log_total, sink))
        log_total = tl.log2(tl.exp2(log_total - larger) + tl.exp2(sink - larger)) + larger
    log_total = finite_or_zero(log_total)

    k_base = k + batch * k_batch + group.to(tl.int64) * k_head
    v_base = v + batch * v_batch + group.to(tl.int64) * v_head
    i_base = indices + batch * i_batch + token * i_token
    end = count_used(i_base, i_place, 0, selected, keys, 1024)
    factor = scale / softcap if HAS_SOFTCAP else scale * LOG2_E
    grown_q = zero_parts(BLOCK_HEADS, WIDTHS)
    place = tl.arange(0, BLOCK_KEYS)
    index = tl.load(i_base + place * i_place, mask=place < end, other=-1)
    for start in tl.range(0, end, BLOCK_KEYS, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK_KEYS)
        later = place + BLOCK_KEYS
        next_index = tl.load(i_base + later * i_place, mask=later < end, other=-1)
        valid = (index >= 0) & (index < keys)
        position = index.to(tl.int64)
        key_parts = load_parts(k_base + position * k_token, valid, k_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
        if VALUES_IN_KEYS:
            value_parts = key_parts
        else:
            value_parts = load_parts(v_base + position * v_token, valid, v_dim, V_SIZE, V_OFFSETS, V_WIDTHS, DTYPE)
        scores = dot_rows(queries, key_parts, factor, BLOCK_HEADS, BLOCK_KEYS, len(WIDTHS), PRECISION)
        grad_scores = scores
        if WITH_KEYS:
            grad_scores = dot_rows(grads, value_parts, scale, BLOCK_HEADS, BLOCK_KEYS, len(V_WIDTHS), PRECISION)
        weights = scores
        # Always taken: see the same branch in the forward pass.
        if keys > 0:
            slope = 1.0
            if HAS_SOFTCAP:
                scores = tanh(scores)
                slope = 1.0 - scores * scores
                scores *= softcap * LOG2_E
            exponents = tl.where(valid[None, :], scores, float("-inf")) - log_total[:, None]
            # No probability is above 1. Of scores that are large `log_total` has lost the places that say so.
            weights = tl.exp2(tl.where(exponents > 0.0, 0.0, exponents))
            if WITH_KEYS:
                grad_scores = weights * (grad_scores - mean[:, None] * scale) * slope
        grad_scores = grad_scores.to(DTYPE)
        weights = weights.to(DTYPE)
        if WITH_KEYS:
            grown = ()
            for i in tl.static_range(len(WIDTHS)):
                grown = grown + (dot(grad_scores, key_parts[i], grown_q[i], PRECISION),)
            grown_q = grown
        if DETERMINISTIC:
            target = program.to(tl.int64) * selected + place
            wanted = place < end
        else:
            target = (batch * keys + position) * GROUPS_HERE + group_here
            wanted = valid
        if WITH_VALUES:
            turned = tl.trans(weights)
            for i in tl.static_range(len(V_WIDTHS)):
                none = tl.full([BLOCK_KEYS, V_WIDTHS[i]], 0.0, tl.float32)
                part = dot(turned, grads[i], none, PRECISION)
                if DETERMINISTIC:
                    store_part(grad_v + target * V_SIZE, wanted, part, V_SIZE, V_OFFSETS[i], V_WIDTHS[i])
                else:
                    add_part(grad_v + target * V_SIZE, wanted, part, V_SIZE, V_OFFSETS[i], V_WIDTHS[i])
        if WITH_KEYS:
            turned = tl.trans(grad_scores)
            for i in tl.static_range(len(WIDTHS)):
                none = tl.full([BLOCK_KEYS, WIDTHS[i]], 0.0, tl.float32)
                part = dot(turned, queries[i], none, PRECISION)
                if DETERMINISTIC:
                    store_part(grad_k + target * SIZE, wanted, part, SIZE, OFFSETS[i], WIDTHS[i])
                else:
                    add_part(grad_k + target * SIZE, wanted, part, SIZE, OFFSETS[i], WIDTHS[i])
        index = next_index

    if WITH_KEYS:
        for i in tl.static_range(len(WIDTHS)):
            store_part(grad_q + own_row * SIZE, real_head, grown_q[i], SIZE, OFFSETS[i], WIDTHS[i])


@triton.jit
def sum_by_key(
    contributions,
    order,
    places,
    total,
    entries,
    sentinel,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`total[places[i]] += sum_j contributions[order[j]]` over the run of equal `places` that begins at entry `i`.

    `places` ascends, so a program that does not stand at the beginning of a run has nothing to do; entries at
    `sentinel` or beyond are padding. One program adds a run from left to right: the sum does not depend on timing.
    """
    entry = tl.program_id(0)
    place = tl.load(places + entry)
    before = tl.load(places + entry - 1, mask=entry > 0, other=-1)
    if (place != before) & (place < sentinel):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < SIZE
        grown = tl.load(total + place * SIZE + column, mask=mask, other=0.0)
        current = entry
        same = place == place
        while same:
            source = tl.load(order + current)
            grown += tl.load(contributions + source * SIZE + column, mask=mask, other=0.0)
            current += 1
            after = tl.load(places + current, mask=current < entries, other=-1)
            same = after == place
        tl.store(total + place * SIZE + column, grown, mask=mask)
