"""Random calls of `indexer_loss`, over all visible tokens and over selected ones.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `H`/`G` query / KV heads,
`D` head dim, `n` tokens that a query compares.
"""

from __future__ import annotations

import numpy as np
import torch

from dsa.ops import indexer_loss
from dsa.testing.fuzz.attention import draw_queries_and_keys, draw_scale, draw_sinks
from dsa.testing.fuzz.draw import Bounded, Draws, compare, numbers
from dsa.testing.fuzz.softmax import EPS, FLUSHED, SMALLEST, row_of

LEAST_MASS = float(np.finfo(np.float32).tiny / np.finfo(np.float32).eps)


def fuzz_indexer_loss(draws: Draws) -> None:
    """One call, with gradients in most cases."""
    impl = draws.implementation()
    batch, tokens, keys = draws.whole(1, 2), draws.size(4, 20), draws.size(20, 70, 300)
    if draws.small:
        tokens, keys = min(tokens, 3), min(keys, 30)
    groups = draws.whole(1, 2)
    heads, dim = groups * draws.size(3, 5), draws.pick((draws.size(9, 20), 16))
    index_heads, index_dim = draws.size(3, 6), draws.pick((draws.size(9, 20), 16))
    dtype = draws.pick(draws.floats)
    scale = draw_scale(draws, dim)
    factor = dim**-0.5 if scale is None else scale
    q, k = draw_queries_and_keys(draws, (batch, tokens, heads, dim), (batch, keys, groups, dim), factor, dtype)
    sinks = draw_sinks(draws, heads)
    if sinks is not None:
        sinks = np.nan_to_num(sinks, nan=0.0, posinf=30.0)
    index_size = draws.pick((1.0, 1.0, 3.0, 10.0, 1e-20))
    qi, ki, wi = (
        draws.lay_out(draws.normal(sizes, size), dtype).detach()
        for sizes, size in (
            ((batch, tokens, index_heads, index_dim), index_size),
            ((batch, keys, index_dim), 1.0),
            ((batch, tokens, index_heads), 1.0),
        )
    )
    index_scale = draws.pick((None, None, 0.1, 3.0, -1.0))
    softcap = None if draws.chance(0.7) else draws.pick((1.0, 30.0, 1e4))
    first, last = draws.pick(((0, 0), (0, 0), (draws.whole(0, 4), draws.whole(0, 6))))
    start, end = draws.ranges(batch, tokens, keys)
    mask = None if draws.chance(0.7) else torch.from_numpy(draws.numbers.random((batch, tokens)) < 0.7)
    indices = None
    if draws.chance(0.5):
        indices = draws.lay_out(draws.numbers.integers(-1, keys, (batch, tokens, draws.size(8, 40))), torch.int32)
    draws.note(
        shape=f"B{batch} T{tokens} S{keys} H{heads} G{groups} D{dim} Hi{index_heads} Di{index_dim}", dtype=dtype,
        scale=scale, index_size=index_size, index_scale=index_scale, softcap=softcap, sinks_local=(first, last),
        selected=indices is not None,
    )  # fmt: skip
    laid_q, laid_k = draws.lay_out(q, dtype), draws.lay_out(k, dtype)
    laid_sinks = None if sinks is None else draws.lay_out(sinks, torch.float32)
    leaves = [x.requires_grad_() for x in (qi, ki, wi)]
    loss = indexer_loss(
        qi, ki, wi, laid_q, laid_k, indices=indices, index_scale=index_scale, attention_scale=scale, key_start=start,
        key_end=end, query_mask=mask, sinks=first, local=last, softcap=softcap, sink_logits=laid_sinks, impl=impl,
    )  # fmt: skip
    grads = torch.autograd.grad(loss, leaves)
    oracle = _Oracle([numbers(x) for x in (qi, ki, wi, laid_q, laid_k)], laid_sinks, factor, softcap, impl == "triton")
    oracle.index_scale = index_dim**-0.5 if index_scale is None else index_scale
    for b, t in np.ndindex(batch, tokens):
        low = 0 if start is None else int(start[b, t])
        high = max(keys - tokens + t + 1, 0) if end is None else int(end[b, t])
        if mask is not None and not mask[b, t]:
            continue
        places = np.arange(low, high)
        if indices is not None:
            row = indices[b, t].numpy()
            places = row[(row >= 0) & (row >= low) & (row < high)]
        kept = (places >= low + first) & (places < high - last)
        if kept.any() and not oracle.add(b, t, places, kept):
            return
    value, expected = oracle.results()
    compare("loss", loss.reshape(1), value)
    for name, grad, bounded in zip(("q_index", "k_index", "w_index"), grads, expected):
        compare(f"gradient of {name}", grad, bounded)


class _Oracle:
    """Adds up the queries that count.

    Args:
        tensors: `q_index, k_index, w_index, q, k` in fp64.
        sinks: `[H]`, or absent.
        scale: On the main attention's scores.
        softcap: On these scores, too.
        coarse_tanh: See `row_of`.
    """

    index_scale = 1.0

    def __init__(
        self,
        tensors: list[np.ndarray],
        sinks: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        coarse_tanh: bool,
    ) -> None:
        self.q_index, self.k_index, self.w_index, self.q, self.k = tensors
        self.sinks = None if sinks is None else numbers(sinks)
        self.scale, self.softcap, self.coarse_tanh = scale, softcap, coarse_tanh
        self.loss = Bounded.zeros((1,))
        self.grads = [Bounded.zeros(x.shape) for x in tensors[:3]]
        self.count = 0
        self.terms = 16

    def add(self, b: int, t: int, places: np.ndarray, kept: np.ndarray) -> bool:
        """Adds one query; `False` where fp32 cannot tell whether it counts, or what its target is."""
        shared = self.q.shape[2] // self.k.shape[2]
        keys = np.repeat(self.k[b, places], shared, axis=1)
        row = row_of(self.q[b, t], keys, self.scale, self.softcap, self.sinks, self.coarse_tanh)
        summed, off_summed = row.weights.sum(axis=0)[kept], row.error.sum(axis=0)[kept]
        mass, off_mass = summed.sum(), off_summed.sum()
        if mass + off_mass < LEAST_MASS / 2:
            return True
        if mass - off_mass < 1e6 * LEAST_MASS:
            # Neither whether it counts nor the digits of what is next to nothing are defined.
            return False
        self.count += 1
        places, count = places[kept], int(kept.sum())
        self.terms += count
        target = summed / mass
        off_target = (
            np.minimum((off_summed + target * off_mass) / max(mass - off_mass, 1e-300), 1.0)
            + (count + 16) * EPS * target
        )
        # The index scores.
        index_keys, queries, factor = self.k_index[b, places], self.q_index[b, t], self.w_index[b, t] * self.index_scale
        dots, sizes = queries @ index_keys.T, np.abs(queries) @ np.abs(index_keys).T
        off_dots = (self.q_index.shape[-1] / 2 + 4) * EPS * sizes + 4 * self.q_index.shape[-1] * SMALLEST
        passed = np.maximum(dots, 0)
        scores = factor @ passed
        off = np.abs(factor) @ (off_dots + (len(factor) + 4) * EPS * passed)
        top = scores.max()
        log_total = np.log(np.exp(scores - top).sum()) + top
        off_log = off.max() + (count + 16) * EPS + 4 * EPS * (abs(top) + abs(log_total))
        predicted = scores - log_total
        off_predicted = off + off_log + 4 * EPS * np.abs(predicted)
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = np.where(target > 0, np.log(target), 0.0) - predicted
            self.loss.exact += np.where(target > 0, target * surprise, 0.0).sum()
        # x log x changes by up to its slope, and by no more than 1/e near zero.
        slope = np.abs(predicted) + 1 + np.where(off_target < 0.5 * target, np.abs(surprise) + 1, 110.0)
        self.loss.error += (
            off_target * slope + (target + off_target) * (off_predicted + 8 * EPS * (1 + np.abs(surprise)))
        ).sum()
        probability = np.exp(predicted)
        grad = probability - target
        off_grad = np.minimum(probability * np.expm1(np.minimum(off_predicted, 50)), 1.0) + 8 * EPS * probability
        off_grad += off_target + 4 * EPS * target + FLUSHED
        # A product so near to zero that it may pass the ReLU or not.
        unsure = (np.abs(dots) <= off_dots) * (np.abs(grad) + off_grad)
        open_heads = dots > 0
        by_head = grad * open_heads
        off_head = off_grad + unsure + (count + 16) * EPS * np.abs(grad)
        rounding = (count + 16) * EPS
        grad_q, grad_k, grad_w = self.grads
        grad_w.exact[b, t] += self.index_scale * (passed @ grad)
        grad_w.error[b, t] += abs(self.index_scale) * (
            passed @ (off_grad + rounding * np.abs(grad)) + off_dots @ (np.abs(grad) + off_grad)
        )
        grad_q.exact[b, t] += factor[:, None] * (by_head @ index_keys)
        grad_q.error[b, t] += np.abs(factor)[:, None] * (off_head @ np.abs(index_keys)) + SMALLEST * count
        spread = by_head[..., None] * (factor[:, None] * queries)[:, None]
        spread_error = off_head[..., None] * np.abs(factor[:, None] * queries)[:, None]
        np.add.at(grad_k.exact[b], places, spread.sum(axis=0))
        np.add.at(
            grad_k.error[b], places, spread_error.sum(axis=0) + 8 * EPS * np.abs(spread).sum(axis=0) + 8 * SMALLEST
        )
        return True

    def results(self) -> tuple[Bounded, list[Bounded]]:
        """The loss and the three gradients: means over the queries."""
        share = 1 / max(self.count, 1)
        for total in (self.loss, *self.grads):
            total.exact *= share
            total.error = total.error * share + self.terms * EPS * np.abs(total.exact) + 4 * SMALLEST
        return self.loss, self.grads
