"""Attention of one query in fp64, with bounds of what fp32 may make of it.

Shapes: `H` heads, `n` keys that the query reads, `D`/`Dv` head dims of keys / values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EPS = 2.0**-23
SMALLEST = 2.0**-149
FLUSHED = 2.0**-125
"""Weights below this, relative to the largest, may be lost."""


@dataclass
class Row:
    """One query's softmax.

    Args:
        scores: `[H, n]`, after softcap.
        slope: `[H, n]`, the softcap's derivative, and its error.
        slope_error: `[H, n]`.
        lse: `[H]`, without the sink.
        lse_error: `[H]`.
        weights: `[H, n]`: probabilities with the sink in the denominator.
        low: `[H, n]`: the least that a probability may be.
        high: `[H, n]`: the most.
        sink: `[H]`: the sink's own probability.
        sink_error: `[H]`.
    """

    scores: np.ndarray
    slope: np.ndarray
    slope_error: np.ndarray
    lse: np.ndarray
    lse_error: np.ndarray
    weights: np.ndarray
    low: np.ndarray
    high: np.ndarray
    sink: np.ndarray
    sink_error: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """How far each probability may be off, `[H, n]`."""
        return np.maximum(self.high - self.weights, self.weights - self.low)


def row_of(
    q: np.ndarray, keys: np.ndarray, scale: float, softcap: float | None, sink: np.ndarray | None, coarse_tanh: bool
) -> Row:
    """The softmax of queries `[H, D]` over `keys[n, H, D]`, `n` at least 1.

    Args:
        coarse_tanh: Whether the softcap's error is that of fp32 at 1, in place of a relative one.
    """
    dim, count = q.shape[-1], keys.shape[0]
    with np.errstate(all="ignore"):
        # Sums of products along the last dim, and the same of their sizes.
        scores = scale * (keys * q).sum(axis=-1).T
        sizes = abs(scale) * (np.abs(keys) * np.abs(q)).sum(axis=-1).T
        # Rounding of each term, of the sum, of the scale and of log2(e); and of numbers that become subnormal.
        off = (dim / 2 + 5) * EPS * sizes + 4 * dim * SMALLEST * (1 + np.abs(keys).max(axis=-1).T)
        slope, slope_error = np.ones_like(scores), np.zeros_like(scores)
        if softcap is not None:
            ratio = np.tanh(scores / softcap)
            # The derivative falls off with distance: a large error of a large score is none of the capped one.
            near = np.nan_to_num(np.maximum(np.abs(scores) - off, 0.0)) / softcap
            flattest = 1.0 - np.tanh(near) ** 2
            off = np.minimum(np.where(np.isfinite(off), off * flattest, 0.0), 2 * softcap) + 6 * EPS * (
                softcap if coarse_tanh else np.abs(softcap * ratio)
            )
            off = off + 4 * SMALLEST * softcap
            slope = 1.0 - ratio**2
            # Of 1 - ratio², both orders: a score that is lost near zero has the steepest slope and a first order of 0.
            lost = off / softcap
            slope_error = np.minimum((2 * np.abs(ratio) + lost) * lost, 1.0) + 8 * EPS
            scores = softcap * ratio
        top = scores.max(axis=-1)
        shift = np.where(top == -np.inf, 0.0, top)
        total = np.exp(scores - shift[:, None]).sum(axis=-1)
        lse = np.log(total) + shift
        # Between all scores at their lowest and all at their highest: one far below the largest is nothing to the sum.
        spread = np.minimum(np.nan_to_num(off, nan=1e30), 1e30)
        off_lse = np.nan_to_num(np.maximum(_log_sum(scores + spread) - lse, lse - _log_sum(scores - spread)))
        lse_error = off_lse + (count + 32) * EPS + 6 * EPS * np.abs(np.where(lse == -np.inf, 0.0, lse))
        sink_share, sink_error, whole, whole_error = np.zeros(len(q)), np.zeros(len(q)), lse, lse_error
        if sink is not None:
            whole = np.logaddexp(lse, sink)
            # What is far below the other does not matter, however large it is.
            by_sink = np.where(sink > lse - 200, 4 * EPS * np.abs(np.where(np.isinf(sink), 0.0, sink)), 0.0)
            by_keys = np.where(lse > sink - 200, lse_error, 0.0)
            whole_error = by_sink + by_keys + 8 * EPS * np.abs(np.where(np.isinf(whole), 0.0, whole)) + 8 * EPS
            sink_share = np.where(sink == np.inf, 1.0, np.exp(sink - whole))
            far = whole_error + by_sink
            low, high = sink_share * np.exp(-far), np.minimum(1.0, sink_share * np.exp(np.minimum(far, 700)))
            sink_error = np.maximum(high - sink_share, sink_share - low) + 16 * EPS * sink_share + FLUSHED
        # Relative to the largest term, because of large scores even fp64 loses what `log total` adds to it.
        base = shift if sink is None else np.maximum(shift, np.where(np.isfinite(sink), sink, shift))
        divisor = total * np.exp(shift - base)
        if sink is not None:
            divisor = divisor + np.where(sink == np.inf, np.inf, np.exp(np.where(sink == np.inf, 0.0, sink) - base))
        exponent = (scores - base[:, None]) - np.log(divisor)[:, None]
        exponent = np.where(scores == -np.inf, -np.inf, exponent)
        weights = np.exp(exponent)
        off = np.minimum(off, 1e30) + whole_error[:, None] + 4 * EPS * np.abs(np.where(weights > 0, exponent, 0.0))
        # An error of 1e30 is no bound at all: the score itself is lost.
        rounding = (count + 32) * EPS
        high = np.exp(np.minimum(exponent + off, 0.0)) * (1 + rounding) + FLUSHED
        low = np.maximum(0.0, np.exp(np.minimum(exponent - off, 0.0)) * (1 - rounding) - FLUSHED)
    return Row(
        scores, slope, slope_error, lse, lse_error, weights, low, np.maximum(high, weights), sink_share, sink_error
    )


def _log_sum(scores: np.ndarray) -> np.ndarray:
    """The logarithm of the sum of exponentials along the last dim."""
    top = scores.max(axis=-1)
    shift = np.where(np.isfinite(top), top, 0.0)
    return np.asarray(np.log(np.exp(scores - shift[:, None]).sum(axis=-1)) + shift)
