"""Kernels of `indexer_loss` over all visible keys (eq. 3), in three sweeps over the keys, none of which stores a score.

`attention_totals` finds each head's softmax denominator and how much of its mass falls on the keys that are compared,
`index_totals` the denominator of the indexer's softmax. With these known, every key's share of the loss and of the
gradients can be computed by itself: `divergence` does so, tile by tile, in any order and by any number of programs.

`p[t, s] = sum_h exp(z[t, h, s] - log_total[t, h])`, target `p / mass`, `I = sum_j coefficient[t, j] relu(dots)`,
`grad_I = exp(I - index_log_total) - target`, times one over the number of queries that count.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `H`/`G` query / KV heads,
`D` head dim, `C` chunks of keys.
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
)


@triton.jit
def attention_totals(
    q,
    k,
    sink_logits,
    visible_start,
    visible_end,
    kept_start,
    kept_end,
    log_totals,
    masses,
    q_strides,
    k_strides,
    tokens,
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes `log_totals[B, H, T]`, base 2 and with the sink, and `masses[B, H, T]`."""
    q_batch, q_token, q_head, q_dim = q_strides
    k_batch, k_token, k_head, k_dim = k_strides
    blocks = tl.cdiv(tokens, BLOCK_ROWS)
    # The last queries see the most keys: begun first, their programs do not end alone.
    row = (blocks - 1 - tl.program_id(0)) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    real = row < tokens
    own = batch * tokens + row
    start = tl.load(visible_start + own, mask=real, other=0).to(tl.int32)
    end = tl.load(visible_end + own, mask=real, other=0).to(tl.int32)
    from_kept = tl.load(kept_start + own, mask=real, other=0).to(tl.int32)
    to_kept = tl.load(kept_end + own, mask=real, other=0).to(tl.int32)
    low = tl.min(tl.where(end > start, start, 2147483647), axis=0)
    high = tl.max(tl.where(end > start, end, 0), axis=0)

    # int64: head times stride passes 2**31 where heads lie outside tokens.
    wide_head = batch * 0 + head
    q_rows = q + batch * q_batch + row.to(tl.int64) * q_token + wide_head * q_head
    queries = load_parts(q_rows, real, q_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
    k_base = k + batch * k_batch + (wide_head // (HEADS // GROUPS)) * k_head
    factor = scale / softcap if HAS_SOFTCAP else scale * LOG2_E
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.full([BLOCK_ROWS], 0.0, tl.float32)
    kept_total = tl.full([BLOCK_ROWS], 0.0, tl.float32)
    for first in tl.range(low, high, BLOCK_KEYS, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK_KEYS)
        keys = load_parts(k_base + column.to(tl.int64) * k_token, column < high, k_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
        scores = dot_rows(queries, keys, factor, BLOCK_ROWS, BLOCK_KEYS, len(WIDTHS), PRECISION)
        if HAS_SOFTCAP:
            scores = tanh(scores) * (softcap * LOG2_E)
        seen = (column[None, :] >= start[:, None]) & (column[None, :] < end[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shift = finite_or_zero(new_top)
        shrink = tl.exp2(top - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        compared = (column[None, :] >= from_kept[:, None]) & (column[None, :] < to_kept[:, None])
        kept_total = kept_total * shrink + tl.sum(tl.where(compared, weights, 0.0), axis=1)
        top = new_top

    shift = finite_or_zero(top)
    if HAS_SINK:
        total += tl.exp2(tl.load(sink_logits + head).to(tl.float32) * LOG2_E - shift)
    log_total = finite_or_zero(tl.log2(total) + shift)
    # Without scores above -infinity the denominator is the sink's term alone, whose reciprocal may be infinite.
    mass = tl.where(kept_total == 0.0, 0.0, kept_total * tl.exp2(shift - log_total))
    mine = (batch * HEADS + head) * tokens + row
    tl.store(log_totals + mine, log_total, mask=real)
    tl.store(masses + mine, tl.where(to_kept > from_kept, mass, 0.0), mask=real)


@triton.jit
def index_totals(
    q,
    k,
    w,
    kept_start,
    kept_end,
    log_totals,
    q_strides,
    k_strides,
    w_strides,
    tokens,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes `log_totals[B, T]`: natural logarithm of the sum of the exponentials of the compared keys' scores."""
    q_batch, q_token, q_head, q_dim = q_strides
    k_batch, k_token, k_dim = k_strides
    w_batch, w_token, w_head = w_strides
    blocks = tl.cdiv(tokens, BLOCK_ROWS)
    row = (blocks - 1 - tl.program_id(0)) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    batch = tl.program_id(1).to(tl.int64)
    real = row < tokens
    own = batch * tokens + row
    start = tl.load(kept_start + own, mask=real, other=0).to(tl.int32)
    end = tl.load(kept_end + own, mask=real, other=0).to(tl.int32)
    low = tl.min(tl.where(end > start, start, 2147483647), axis=0)
    high = tl.max(tl.where(end > start, end, 0), axis=0)
    q_rows = q + batch * q_batch + row.to(tl.int64) * q_token
    w_rows = w + batch * w_batch + row.to(tl.int64) * w_token
    k_base = k + batch * k_batch
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.full([BLOCK_ROWS], 0.0, tl.float32)
    for first in tl.range(low, high, BLOCK_KEYS, num_stages=1):
        column = first + tl.arange(0, BLOCK_KEYS)
        keys = load_parts(k_base + column.to(tl.int64) * k_token, column < high, k_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
        scores = _index_scores(
            q_rows, w_rows, real, keys, q_head, q_dim, w_head, scale,
            HEADS, SIZE, OFFSETS, WIDTHS, DTYPE, PRECISION, BLOCK_ROWS, BLOCK_KEYS, STAGES,
        )  # fmt: skip
        seen = (column[None, :] >= start[:, None]) & (column[None, :] < end[:, None])
        scores = tl.where(seen, scores * LOG2_E, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shift = finite_or_zero(new_top)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(scores - shift[:, None]), axis=1)
        top = new_top
    tl.store(log_totals + own, finite_or_zero(tl.log2(total) + finite_or_zero(top)) * LN_2, mask=real)


@triton.jit
def _index_scores(
    q_rows,
    w_rows,
    real,
    keys,
    q_head,
    q_dim,
    w_head,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Index scores `[rows, keys]` of a tile of keys, head after head."""
    scores = tl.full([BLOCK_ROWS, BLOCK_KEYS], 0.0, tl.float32)
    for head in tl.range(0, HEADS, num_stages=STAGES):
        queries = load_parts(q_rows + head * q_head, real, q_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
        coefficient = tl.load(w_rows + head * w_head, mask=real, other=0.0).to(tl.float32) * scale
        dots = dot_rows(queries, keys, 1.0, BLOCK_ROWS, BLOCK_KEYS, len(WIDTHS), PRECISION)
        # Not a maximum with zero, which would hide a NaN.
        scores += coefficient[:, None] * tl.where(dots < 0.0, 0.0, dots)
    return scores


@triton.jit
def divergence(
    q_index,
    k_index,
    w_index,
    q,
    k,
    kept_start,
    kept_end,
    log_totals,
    masses,
    index_log_totals,
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
    tokens,
    keys,
    first_token,
    tokens_here,
    keys_per_chunk,
    index_scale,
    scale,
    softcap,
    INDEX_HEADS: tl.constexpr,
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds one chunk of keys to the loss and the gradients of the queries `[first_token, first_token + tokens_here)`.

    Writes `losses[C, B, T]`; adds to the fp32 `grad_q[B, tokens_here, Hi, Di]`, `grad_w[B, tokens_here, Hi]` and
    `grad_k[B, S, Di]`.
    """
    qi_batch, qi_token, qi_head, qi_dim = qi_strides
    ki_batch, ki_token, ki_dim = ki_strides
    w_batch, w_token, w_head = w_strides
    q_batch, q_token, q_head, q_dim = q_strides
    k_batch, k_token, k_head, k_dim = k_strides
    blocks = tl.cdiv(tokens_here, BLOCK_ROWS)
    local = (blocks - 1 - tl.program_id(0)) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    chunk = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = first_token + local
    own = batch * tokens + row
    mass = tl.load(masses + own, mask=local < tokens_here, other=0.0)
    counted = mass != 0.0
    from_kept = tl.load(kept_start + own, mask=counted, other=0).to(tl.int32)
    to_kept = tl.load(kept_end + own, mask=counted, other=0).to(tl.int32)
    # Bounds of what is compared: what is only visible entered the totals already.
    low = tl.maximum(tl.min(tl.where(to_kept > from_kept, from_kept, 2147483647), axis=0), chunk * keys_per_chunk)
    high = tl.minimum(tl.max(tl.where(to_kept > from_kept, to_kept, 0), axis=0), (chunk + 1) * keys_per_chunk)
    index_log_total = tl.load(index_log_totals + own, mask=counted, other=0.0)
    inverse_mass = 1.0 / tl.where(counted, mass, 1.0)
    grad_scale = tl.load(share)

    wide_row = row.to(tl.int64)
    q_rows = q + batch * q_batch + wide_row * q_token
    qi_rows = q_index + batch * qi_batch + wide_row * qi_token
    w_rows = w_index + batch * w_batch + wide_row * w_token
    ki_base = k_index + batch * ki_batch
    k_base = k + batch * k_batch
    factor = scale / softcap if HAS_SOFTCAP else scale * LOG2_E
    loss = tl.full([BLOCK_ROWS], 0.0, tl.float32)
    for first in tl.range(low, high, BLOCK_KEYS, num_stages=1):
        column = first + tl.arange(0, BLOCK_KEYS)
        wide_column = column.to(tl.int64)
        compared = (column[None, :] >= from_kept[:, None]) & (column[None, :] < to_kept[:, None])
        compared = compared & (column[None, :] < high)
        probability = tl.full([BLOCK_ROWS, BLOCK_KEYS], 0.0, tl.float32)
        for head in tl.range(0, HEADS, num_stages=STAGES):
            wide_head = batch * 0 + head
            queries = load_parts(q_rows + wide_head * q_head, counted, q_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
            group = wide_head // (HEADS // GROUPS)
            rows = k_base + wide_column * k_token + group * k_head
            main_keys = load_parts(rows, column < high, k_dim, SIZE, OFFSETS, WIDTHS, DTYPE)
            logits = dot_rows(queries, main_keys, factor, BLOCK_ROWS, BLOCK_KEYS, len(WIDTHS), PRECISION)
            if HAS_SOFTCAP:
                logits = tanh(logits) * (softcap * LOG2_E)
            log_total = tl.load(log_totals + (batch * HEADS + head) * tokens + row, mask=counted, other=0.0)
            probability += tl.exp2(logits - log_total[:, None])
        target = tl.where(compared, probability * inverse_mass[:, None], 0.0)

        # A key that no query of the block compares may be memory that was never written: 0 * NaN is NaN.
        wanted = tl.max(compared.to(tl.int32), axis=0) > 0
        index_keys = load_parts(
            ki_base + wide_column * ki_token, wanted, ki_dim, INDEX_SIZE, INDEX_OFFSETS, INDEX_WIDTHS, INDEX_DTYPE
        )
        scores = _index_scores(
            qi_rows, w_rows, counted, index_keys, qi_head, qi_dim, w_head, index_scale,
            INDEX_HEADS, INDEX_SIZE, INDEX_OFFSETS, INDEX_WIDTHS, INDEX_DTYPE, INDEX_PRECISION,
            BLOCK_ROWS, BLOCK_KEYS, STAGES,
        )  # fmt: skip
        predicted = scores - index_log_total[:, None]
        surprise = target * (tl.log2(tl.where(target > 0.0, target, 1.0)) * LN_2 - predicted)
        loss += tl.sum(tl.where(compared & (target != 0.0), surprise, 0.0), axis=1)
        if GRADIENTS:
            grad_scores = tl.where(compared, (tl.exp2(predicted * LOG2_E) - target) * grad_scale, 0.0)
            grown_k = ()
            for i in tl.static_range(len(INDEX_WIDTHS)):
                grown_k = grown_k + (tl.full([BLOCK_KEYS, INDEX_WIDTHS[i]], 0.0, tl.float32),)
            for head in tl.range(0, INDEX_HEADS, num_stages=STAGES):
                queries = load_parts(
                    qi_rows + head * qi_head, counted, qi_dim, INDEX_SIZE, INDEX_OFFSETS, INDEX_WIDTHS, INDEX_DTYPE
                )
                coefficient = tl.load(w_rows + head * w_head, mask=counted, other=0.0).to(tl.float32) * index_scale
                dots = dot_rows(queries, index_keys, 1.0, BLOCK_ROWS, BLOCK_KEYS, len(INDEX_WIDTHS), INDEX_PRECISION)
                passed = tl.where(dots > 0.0, grad_scores, 0.0)
                mine = (batch * tokens_here + local) * INDEX_HEADS + head
                tl.atomic_add(grad_w + mine, tl.sum(passed * dots, axis=1) * index_scale, mask=counted, sem="relaxed")
                weighted = passed * coefficient[:, None]
                turned = tl.trans(weighted.to(INDEX_DTYPE))
                weighted = weighted.to(INDEX_DTYPE)
                next_k = ()
                for i in tl.static_range(len(INDEX_WIDTHS)):
                    none = tl.full([BLOCK_ROWS, INDEX_WIDTHS[i]], 0.0, tl.float32)
                    part = dot(weighted, index_keys[i], none, INDEX_PRECISION)
                    add_part(grad_q + mine * INDEX_SIZE, counted, part, INDEX_SIZE, INDEX_OFFSETS[i], INDEX_WIDTHS[i])
                    next_k = next_k + (dot(turned, queries[i], grown_k[i], INDEX_PRECISION),)
                grown_k = next_k
            k_rows = grad_k + (batch * keys + wide_column) * INDEX_SIZE
            for i in tl.static_range(len(INDEX_WIDTHS)):
                add_part(k_rows, wanted, grown_k[i], INDEX_SIZE, INDEX_OFFSETS[i], INDEX_WIDTHS[i])
    batches = tl.num_programs(2)
    tl.store(losses + chunk * batches * tokens + own, loss, mask=local < tokens_here)
