"""Lightning indexer and top-k selection in plain torch: the specification of `index_topk`.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `Gs` selections of a query,
`K` top-k; `n` query tokens and `s` key columns of one block. The dim `Gs` is there where the weights have it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsa.ops.index_topk.selection import crowded_rows, select_by_blocks
from dsa.ops.quantize.reference import KEY_LEVELS, QUERY_LEVELS, quantize_queries_int8, rotate
from dsa.ops.quantize.types import QuantizedKeys
from dsa.ops.ranges import Block, VisibleRanges


class ScoreInputs(NamedTuple):
    """`score[t, s] = (sum over j in order of coefficient[t, j] * relu(query[t, j] . key[s])) * key_scale[s]`.

    Args:
        query: `[B, T, Hi, Di]`, in the dtype of the dot products.
        key: `[B, S, Di]`, in the dtype of the dot products.
        coefficient: `[B, T, (Gs,) Hi]`, in the dtype of the scores.
        key_scale: `[B, S]` in the dtype of the scores, or `None` for 1.
    """

    query: Tensor
    key: Tensor
    coefficient: Tensor
    key_scale: Tensor | None


def prepare_scores(q: Tensor, k: Tensor | QuantizedKeys, w: Tensor, scale: float) -> ScoreInputs:
    """Brings queries, keys and weights into the form in which they are scored.

    The dot products must not depend on how a matrix product is split into tiles, or the selection would
    change with chunking and padding. Integers are exact. Everything else is multiplied in fp64 and rounded
    to fp32 once, which hides the order of summation.
    """
    if isinstance(k, Tensor):
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        coefficient = w.to(wide) * scale
        return ScoreInputs(q.double(), k.double(), coefficient, None)
    if k.dtype == "fp8":
        # Through fp32, which holds every e4m3 number: not every device converts it to fp64.
        return ScoreInputs(rotate(q).double(), k.data.float().double(), w.float() * scale, k.scale)
    data, query_scale = quantize_queries_int8(q)
    largest = KEY_LEVELS * QUERY_LEVELS * q.shape[-1]
    exact = torch.float32 if largest < 1 << 24 else torch.float64
    if w.ndim == 4:
        query_scale = query_scale.unsqueeze(2)
    return ScoreInputs(data.to(exact), k.data.to(exact), (w.float() * query_scale) * scale, k.scale)


def score_block(inputs: ScoreInputs, block: Block) -> Tensor:
    """Scores `[B, n, (Gs,) s]` of one block: products and sums are rounded one by one, head after head."""
    query = inputs.query[block.batch, block.rows].transpose(1, 2)
    batch, heads, rows, head_dim = query.shape
    key = inputs.key[block.batch, block.columns]
    coefficient = inputs.coefficient[block.batch, block.rows]
    dots = torch.matmul(query.reshape(batch, heads * rows, head_dim), key.transpose(1, 2))
    dots = dots.view(batch, heads, rows, block.width)
    scores = None
    for head in range(heads):
        term = dots[:, head].to(coefficient.dtype).relu_()
        if coefficient.ndim == 4:
            term = term.unsqueeze(2).repeat(1, 1, coefficient.shape[2], 1)
        term.mul_(coefficient[..., head, None])
        scores = term if scores is None else scores.add_(term)
    assert scores is not None
    if inputs.key_scale is not None:
        key_scale = inputs.key_scale[block.batch, None, block.columns]
        scores.mul_(key_scale.unsqueeze(2) if scores.ndim == 4 else key_scale)
    return scores


def index_topk(
    q: Tensor,
    k: Tensor | QuantizedKeys,
    w: Tensor,
    top_k: int,
    *,
    scale: float,
    sinks: int,
    local: int,
    ranges: VisibleRanges,
) -> Tensor:
    """int32 `[B, T, (Gs,) K]`; arguments as in `api.index_topk`, validated and resolved."""
    rows = crowded_rows(ranges, top_k).to(q.device)
    inputs = prepare_scores(q[:, rows], k, w[:, rows], scale) if rows.numel() else None

    def score(block: Block) -> Tensor:
        assert inputs is not None
        return score_block(inputs, block)

    size = 8 if inputs is None else inputs.query.element_size()
    selections = w.shape[2] if w.ndim == 4 else None
    bytes_per_pair = q.shape[0] * (q.shape[2] * size + 12 * (selections or 1))
    return select_by_blocks(ranges, top_k, sinks, local, score, bytes_per_pair, selections)
