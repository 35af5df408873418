"""Random calls of `index_projection`.

Shapes: `B` batch, `T` tokens, `C` hidden size, `Hi`/`Di` index heads / index head dim, `R` rotated dims.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsa.ops import index_projection
from dsa.ops.index_projection import IndexWeights, Rope, rope_tables
from dsa.ops.quantize.types import QuantizedKeys
from dsa.testing.fuzz.draw import Bounded, Difference, Draws, compare, numbers, smallest
from dsa.testing.fuzz.quantizing import KEY_LEVELS, near
from dsa.testing.fuzz.softmax import EPS, SMALLEST

NORM_EPSILON = 1e-6

OVERFLOWS = 1e18
"""Projections of this size have squares that may leave fp32, and with them the variance."""


def fuzz_index_projection(draws: Draws) -> None:
    """One call: keys written into a cache of fp32, int8 or fp8, and nothing around them; queries and head weights."""
    impl = draws.implementation()
    compiled = impl == "native"
    batch, tokens = draws.whole(1, 3), draws.pick((1, 1, draws.whole(0, 4)))
    width, heads, dim = draws.size(20, 90, 700), draws.size(3, 9), draws.pick((draws.size(9, 70), 16, 32, 64))
    rotated = 2 * draws.whole(0, dim // 2)
    dtype = torch.float32 if compiled else draws.pick(draws.floats)
    weights = _weights(draws, width, heads, dim, dtype, dense=compiled)
    sizes = (1.0, 1.0, 1.0, 1e-3) if dtype.itemsize == 2 else (1.0, 1.0, 1.0, 1e-20, 1e-42, 1e12)
    hidden = draws.normal((batch, tokens, width), draws.pick(sizes))
    if hidden.size and draws.chance(0.15):
        hidden.reshape(-1)[draws.whole(0, hidden.size - 1)] = draws.pick((np.nan, np.inf, -np.inf))
    given = draws.lay_out(hidden, dtype)
    if compiled and given.stride(-1) != 1:
        given = given.contiguous()
    rope = _tables(draws, batch, tokens, rotated, dense=compiled) if rotated else None
    kind = draws.pick(("fp32", "int8") if compiled else ("fp32", "int8", "fp8"))
    queries, begin = draws.chance(0.7), draws.whole(0, 5)
    out = _cache(draws, kind, batch, begin + tokens + draws.whole(0, 4), dim)
    draws.note(
        shape=f"B{batch} T{tokens} C{width} Hi{heads} Di{dim} R{rotated}", dtype=dtype, kind=kind, begin=begin,
        queries=queries,
    )  # fmt: skip
    made = index_projection(given, weights, rope, out, begin, queries=queries, impl=impl)
    _nothing_around(out, begin, begin + tokens)
    oracle = _Oracle(given, weights, rope)
    _judge_keys(out[:, begin : begin + tokens], oracle.keys())
    if (made is not None) != queries:
        raise Difference(f"index_projection: returned {made} for queries={queries}")
    if made is not None:
        if (made[0].dtype, made[1].dtype) != (dtype, torch.float32):
            raise Difference(f"index_projection: queries in {made[0].dtype}, head weights in {made[1].dtype}")
        compare("queries", made[0], oracle.queries())
        compare("head weights", made[1], oracle.head_weights())


def _weights(draws: Draws, width: int, heads: int, dim: int, dtype: torch.dtype, *, dense: bool) -> IndexWeights:
    size = width**-0.5
    drawn = [draws.normal(sizes, size) for sizes in ((heads * dim, width), (dim, width), (heads, width))]
    drawn += [draws.normal((dim,), draws.pick((1.0, 1.0, 0.0, 1e-3))) for _ in range(2)]
    laid = [torch.from_numpy(x).to(dtype) if dense else draws.lay_out(x, dtype) for x in drawn]
    return IndexWeights(*laid)


def _tables(draws: Draws, batch: int, tokens: int, rotated: int, *, dense: bool) -> Rope:
    angles = draws.numbers.uniform(-4, 4, (draws.pick((1, batch)), tokens, rotated // 2))
    tables = rope_tables(*(torch.from_numpy(turn(angles)).float() for turn in (np.cos, np.sin)))
    if dense:
        return tables
    cos, sin = (draws.lay_out(table, torch.float32) for table in tables)
    return cos, sin


def _cache(draws: Draws, kind: str, batch: int, capacity: int, dim: int) -> Tensor | QuantizedKeys:
    """Storage for keys, with rows that lie apart in memory in some cases, filled with what nobody may change."""
    stored = {"fp32": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    sizes = (batch + draws.pick((0, 1)), capacity + draws.pick((0, 2)), dim + draws.pick((0, 4)))
    turned = draws.chance(0.3)
    data = torch.full((sizes[1], sizes[0], sizes[2]) if turned else sizes, 99.0).to(stored)
    data = (data.transpose(0, 1) if turned else data)[:batch, :capacity, :dim]
    if kind == "fp32":
        return data
    scale = torch.full((capacity, batch), 99.0).T if turned else torch.full((batch, capacity), 99.0)
    return QuantizedKeys(data, scale)


def _nothing_around(out: Tensor | QuantizedKeys, begin: int, end: int) -> None:
    mark = torch.full((), 99.0)
    for part in (out[:, :begin], out[:, end:]):
        tensors = (part.data, part.scale) if isinstance(part, QuantizedKeys) else (part,)
        if not all((x.float() == mark.to(x.dtype).float()).all() for x in tensors):
            raise Difference("index_projection: wrote to places that are not those of the new tokens")


def _judge_keys(keys: Tensor | QuantizedKeys, expected: Bounded) -> None:
    if isinstance(keys, Tensor):
        return compare("keys", keys, expected)
    with np.errstate(all="ignore"):
        exact, error = _hadamard(expected)
    # Judged where the sums are certain to stay within fp32.
    known = np.isfinite(error).all(axis=-1) | ~np.isfinite(exact).any(axis=-1)
    data, scale = numbers(keys.data.float()), numbers(keys.scale)
    levels = KEY_LEVELS if keys.dtype == "int8" else None
    near(exact[known], data[known], scale[known], levels, False, np.nan_to_num(error[known], posinf=0.0))


def _hadamard(keys: Bounded) -> tuple[np.ndarray, np.ndarray]:
    """Keys after the rotation of `quantize`, and how far each may be off."""
    dim = keys.exact.shape[-1]
    if dim & (dim - 1):
        return keys.exact, keys.error
    signs = np.ones((1, 1))
    while len(signs) < dim:
        signs = np.block([[signs, signs], [signs, -signs]])
    sizes = (np.abs(keys.exact).sum(axis=-1, keepdims=True) * EPS * dim + keys.error.sum(axis=-1, keepdims=True)) + (
        dim * SMALLEST
    )
    # A key that is not finite in one place is not finite in any.
    exact = np.where(np.isfinite(keys.exact).all(axis=-1, keepdims=True), keys.exact @ signs, np.nan)
    return exact * dim**-0.5, np.broadcast_to(sizes * dim**-0.5 + EPS * np.abs(exact), exact.shape)


class _Oracle:
    """What `index_projection/README.md` defines, in fp64, with bounds of what fp32 and the dtype may make of it.

    Every result of a step is rounded to the dtype of the hidden states, as torch's modules do.
    """

    def __init__(self, hidden: Tensor, weights: IndexWeights, rope: Rope | None) -> None:
        self.hidden = numbers(hidden)
        self.query, self.key, self.head, self.norm, self.norm_bias = (numbers(x) for x in weights.tensors)
        self.heads, self.dim = weights.heads, weights.dim
        self.rope = None if rope is None else [numbers(table) for table in rope]
        self.eps = torch.finfo(hidden.dtype).eps
        self.smallest = smallest(hidden.dtype)

    def _rounded(self, exact: np.ndarray, error: np.ndarray, sizes: np.ndarray | None = None) -> Bounded:
        """With a rounding of numbers as large as `sizes`, by default the results."""
        return Bounded(exact, error + self.eps * (np.abs(exact) if sizes is None else sizes) + 4 * self.smallest)

    def _product(self, matrix: np.ndarray) -> Bounded:
        width = matrix.shape[-1]
        with np.errstate(all="ignore"):
            exact, sizes = self.hidden @ matrix.T, np.abs(self.hidden) @ np.abs(matrix).T
            error = (width / 2 + 2) * EPS * sizes + 2 * width * SMALLEST
            # The sum may overflow on its way, or lose a product of infinity and a number that is zero in the dtype.
            return self._rounded(exact, np.where(sizes > 1e37, np.inf, error))

    def _turned(self, x: Bounded, cos: np.ndarray, sin: np.ndarray) -> Bounded:
        """RoPE on the first dims."""
        rotated = cos.shape[-1]
        first, rest = x.exact[..., :rotated], x.exact[..., rotated:]
        off = x.error[..., :rotated]
        with np.errstate(all="ignore"):
            partner, partner_off = (np.roll(part, rotated // 2, axis=-1) for part in (first, off))
            turned = first * cos + partner * sin
            sizes = np.abs(first * cos) + np.abs(partner * sin)
            spread = off * (np.abs(cos) + self.eps) + partner_off * (np.abs(sin) + self.eps)
            result = self._rounded(turned, spread, 4 * sizes)
        return Bounded(
            np.concatenate([result.exact, rest], axis=-1),
            np.concatenate([result.error, x.error[..., rotated:]], axis=-1),
        )

    def keys(self) -> Bounded:
        """`[B, T, Di]`."""
        projected = self._product(self.key)
        with np.errstate(all="ignore"):
            y, off = projected.exact, projected.error
            dim = self.dim
            largest = np.abs(y).max(axis=-1, keepdims=True)
            away = y - y.mean(axis=-1, keepdims=True)
            # The mean is a sum of `Di` numbers in fp32; so is what any way of computing the variance takes it from.
            off_away = off + off.mean(axis=-1, keepdims=True) + (dim + 2) * EPS * largest
            # sqrt(mean(x^2) + epsilon) is a norm of (x, sqrt(epsilon)): it moves by no more than that of the error.
            deviation = np.sqrt((away**2).mean(axis=-1, keepdims=True) + NORM_EPSILON)
            moved = np.sqrt((off_away**2).mean(axis=-1, keepdims=True)) + (dim + 8) * EPS * deviation
            least = np.maximum(deviation - moved, NORM_EPSILON**0.5 * (1 - (dim + 8) * EPS))
            normal = away / deviation
            off_normal = off_away / least + np.abs(normal) * moved / least + 4 * EPS * np.abs(normal)
            off_normal = np.where(largest > OVERFLOWS, np.inf, off_normal)
            scaled = normal * self.norm
            # Zero times an error without bound is zero.
            spread = np.where(self.norm == 0, 0.0, np.abs(self.norm) * off_normal)
            key = self._rounded(scaled + self.norm_bias, spread + 4 * EPS * (np.abs(scaled) + np.abs(self.norm_bias)))
        return key if self.rope is None else self._turned(key, *self.rope)

    def queries(self) -> Bounded:
        """`[B, T, Hi, Di]`."""
        made = self._product(self.query)
        sizes: Sequence[int] = (*made.exact.shape[:2], self.heads, self.dim)
        query = Bounded(made.exact.reshape(sizes), made.error.reshape(sizes))
        return query if self.rope is None else self._turned(query, *(table[:, :, None] for table in self.rope))

    def head_weights(self) -> Bounded:
        """`[B, T, Hi]`, with the factor `Hi**-0.5`."""
        made, factor = self._product(self.head), self.heads**-0.5
        with np.errstate(all="ignore"):
            return Bounded(made.exact * factor, made.error * factor + 2 * EPS * np.abs(made.exact))
