"""What each operation means, written row by row: no blocks, no masks, no shared code with the implementations.

All work in the dtype of their inputs (fp64 in most tests) and are differentiable where the operation is.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `H`/`G` query / KV heads,
`D`/`Dv` head dims of keys / values, `K` top-k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Positions = list[list[list[int]]]
"""By batch and query, the key positions it reads."""


def visible_positions(
    key_start: Tensor | None, key_end: Tensor | None, batch: int, tokens: int, keys: int
) -> Positions:
    """What each query sees, with the defaults filled in."""
    return [
        [
            list(
                range(
                    0 if key_start is None else int(key_start[b, t]),
                    max(0, keys - tokens + t + 1) if key_end is None else int(key_end[b, t]),
                )
            )
            for t in range(tokens)
        ]
        for b in range(batch)
    ]


def selected_positions(indices: Tensor) -> Positions:
    """What a selection `[B, T, K]` reads, without its `-1`."""
    return [[[s for s in row if s >= 0] for row in rows] for rows in indices.tolist()]


def without_always_read(positions: Positions, sinks: int, local: int) -> Positions:
    """Positions without the first `sinks` and the last `local` of each row."""
    return [[row[sinks : max(0, len(row) - local)] for row in rows] for rows in positions]


def index_scores(q: Tensor, k: Tensor, w: Tensor, scale: float | None = None) -> Tensor:
    """`[B, T, S]`: `scale * sum_j w[t, j] * relu(q[t, j] . k[s])`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dots = (q.unsqueeze(3) * k[:, None, None]).sum(dim=-1)
    return scale * (w.unsqueeze(-1) * dots.relu()).sum(dim=2)


def int8_index_scores(
    query: Tensor, query_scale: Tensor, key: Tensor, key_scale: Tensor, w: Tensor, scale: float
) -> Tensor:
    """fp32 `[B, T, S]`, in the documented order of operations, from integers `query` and `key`."""
    dots = (query.long().unsqueeze(3) * key.long()[:, None, None]).sum(dim=-1)
    coefficient = (w.float() * query_scale) * torch.tensor(scale, dtype=torch.float32)
    scores = torch.zeros(())
    for head in range(query.shape[2]):
        product = coefficient[:, :, head, None] * dots[:, :, head].clamp_min(0).float()
        scores = product if head == 0 else scores + product
    return scores * key_scale[:, None]


def select(scores: Tensor, visible: Positions, top_k: int, sinks: int, local: int) -> Tensor:
    """int32 `[B, T, K]`: sorts each row by always read, not NaN, score, and position."""
    batch, tokens, _ = scores.shape
    selection = torch.full((batch, tokens, top_k), -1, dtype=torch.int32)
    for b in range(batch):
        for t in range(tokens):
            seen = visible[b][t]
            row = scores[b, t].tolist()
            optional = set(seen[sinks : max(sinks, len(seen) - local)])

            def rank(s: int, row: list[float] = row, optional: set[int] = optional) -> tuple[bool, bool, float, int]:
                unknown = math.isnan(row[s])
                return s not in optional, not unknown, 0.0 if unknown else row[s], s

            best = sorted(sorted(seen, key=rank, reverse=True)[:top_k])
            selection[b, t, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return selection


def assert_selection_optimal(
    selection: Tensor, scores: Tensor, visible: Positions, top_k: int, sinks: int, local: int, tolerance: float
) -> None:
    """Judges a selection by its scores: nothing left out beats anything chosen by more than `tolerance`.

    Raises:
        AssertionError: Also for a wrong count, order, duplicate, hidden position or missing sink or local token.
    """
    for b, rows in enumerate(selection.tolist()):
        for t, row in enumerate(rows):
            seen = visible[b][t]
            count = min(top_k, len(seen))
            chosen = row[:count]
            assert row[count:] == [-1] * (top_k - count), f"query {b}, {t}: {row} must hold {count} positions"
            assert chosen == sorted(set(chosen)), f"query {b}, {t}: {chosen} must ascend"
            assert set(chosen) <= set(seen), f"query {b}, {t}: {chosen} must be visible"
            always = set(seen[:sinks]) | set(seen[len(seen) - local :] if local else [])
            assert always <= set(chosen), f"query {b}, {t}: {chosen} lacks some of {always}"
            optional = [scores[b, t, s].item() for s in chosen if s not in always]
            rest = [scores[b, t, s].item() for s in seen if s not in chosen]
            if optional and rest:
                assert min(optional) >= max(rest) - tolerance, f"query {b}, {t}: {min(optional)} < {max(rest)}"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Positions,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`out[B, T, H, Dv]` and `lse[B, T, H]` of attention over the given positions."""
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full(q.shape[:3], -math.inf)
    rows = []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            if not positions[b][t]:
                rows.append(out[b, t])
                continue
            logits = attention_logits(q[b, t], k[b], positions[b][t], scale, softcap)
            lse[b, t] = logits.detach().logsumexp(dim=-1)
            lse[b, t][lse[b, t] == math.inf] = math.nan
            values = v[b, positions[b][t]].to(q.dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=1)
            weights = attention_weights(logits, sink_logits)
            # Minus infinity everywhere is the limit of nothing selected.
            weights = torch.where(lse[b, t, :, None] == -math.inf, torch.zeros_like(weights), weights)
            rows.append((weights.unsqueeze(-1) * values.transpose(0, 1)).sum(dim=1))
    return (torch.stack(rows).view(out.shape) if rows else out), lse


def attention_logits(q: Tensor, k: Tensor, positions: list[int], scale: float | None, softcap: float | None) -> Tensor:
    """`[H, positions]` of one query `[H, D]` over keys `[S, G, D]`."""
    keys = k[positions].to(q.dtype).repeat_interleave(q.shape[0] // k.shape[1], dim=1)
    logits = (q.unsqueeze(0) * keys).sum(dim=-1).T * (q.shape[-1] ** -0.5 if scale is None else scale)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def attention_weights(logits: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Softmax of `[H, positions]`, with one more logit per head in the denominator."""
    if sink_logits is None:
        return logits.softmax(dim=-1)
    return torch.cat((logits, sink_logits.to(logits.dtype).unsqueeze(-1)), dim=-1).softmax(dim=-1)[:, :-1]


def indexer_loss(
    q_index: Tensor,
    k_index: Tensor,
    w_index: Tensor,
    q: Tensor,
    k: Tensor,
    read: Positions,
    kept: Positions,
    *,
    query_mask: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Mean KL over the queries that keep something: attention over `read`, both distributions over `kept`."""
    scores = index_scores(q_index, k_index, w_index)
    losses = []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            places = [i for i, s in enumerate(read[b][t]) if s in set(kept[b][t])]
            if not places or (query_mask is not None and not query_mask[b, t]):
                continue
            logits = attention_logits(q[b, t].to(scores.dtype), k[b], read[b][t], None, softcap)
            target = attention_weights(logits, sink_logits).sum(dim=0)[places].detach()
            target = target / target.sum()
            predicted = scores[b, t, [read[b][t][i] for i in places]].log_softmax(dim=-1)
            losses.append((torch.xlogy(target, target) - target * predicted).sum())
    return torch.stack(losses).mean() if losses else 0 * scores.sum()
