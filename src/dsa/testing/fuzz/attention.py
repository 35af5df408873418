"""Random calls of `dense_attention` and `sparse_attention`, over plain tensors, FP8 rows and pages of them.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values, `K`
selected tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsa.ops import dense_attention, sparse_attention
from dsa.ops.packed_latents import pack_latents
from dsa.ops.packed_latents.types import PackedLatents
from dsa.ops.paging.types import PagedLatents
from dsa.testing.fuzz.draw import Bounded, Difference, Draws, compare, numbers, smallest
from dsa.testing.fuzz.softmax import EPS, FLUSHED, SMALLEST, Row, row_of

OVERFLOWS = 1e35
"""Sums of products of this size may leave fp32 on their way to a result that it holds."""

LOGITS = (1.0, 1.0, 1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 30.0, 30.0, 80.0, 88.0, 104.0, 150.0, 1e3, 1e4, 1e6, 1e10, 1e20, 1e34)
"""Sizes that the scores are drawn for; from 87 on their differences leave the exponential of fp32."""

SINKS = (0.0, 1.0, -1.0, 30.0, 80.0, 87.0, 88.5, 95.0, 103.0, 104.0, 110.0, 200.0, 1e4, 1e20, 1e38)


@dataclass
class Problem:
    """One call, in the tensors that are handed over, and what each query reads."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    scale: float | None
    softcap: float | None
    positions: list[list[np.ndarray]]
    coarse_tanh: bool

    @property
    def factor(self) -> float:
        """The scale, with its default filled in."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale


def draw_scale(draws: Draws, dim: int) -> float | None:
    """Mostly the default."""
    kind = draws.pick((*["default"] * 8, "usual", "usual", "negative", "tiny", "huge", "zero"))
    usual = dim**-0.5 * draws.random.uniform(0.3, 3.0)
    return {"default": None, "usual": usual, "negative": -usual, "tiny": 1e-12, "huge": 1e12, "zero": 0.0}[kind]


def draw_queries_and_keys(
    draws: Draws, query_sizes: tuple[int, ...], key_sizes: tuple[int, ...], scale: float, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers `[B, T, H, D]` and `[B, S, G, D]` whose scores have a size that is drawn, as far as the dtype allows."""
    largest = 30.0 if dtype == torch.float16 else 1e16
    logit = draws.pick(LOGITS)
    q_size = draws.pick((*[1.0] * 9, 1e-3, largest, 1e-42))
    wanted = logit / (abs(scale or 1.0) * q_size * query_sizes[-1] ** 0.5)
    k_size = float(np.clip(wanted, 1e-30, 1e3 if dtype == torch.float16 else 1e18))
    draws.note(logit=logit, q_size=q_size, k_size=k_size)
    return draws.normal(query_sizes, q_size), draws.normal(key_sizes, k_size)


def draw_sinks(draws: Draws, heads: int) -> np.ndarray | None:
    """`[H]`, of any size, beyond the edges of fp32's exponential too; infinite or NaN in a few cases."""
    if draws.chance(0.45):
        return None
    sign = draws.numbers.choice((-1.0, 1.0), heads)
    sinks = sign * draws.numbers.choice(SINKS, heads) * draws.numbers.uniform(0.98, 1.02, heads)
    if draws.chance(0.1):
        sinks[draws.whole(0, heads - 1)] = draws.pick((-np.inf, -np.inf, np.inf, np.nan))
    draws.note(sinks=sinks.tolist())
    return sinks


def fuzz_dense(draws: Draws) -> None:
    """One call of `dense_attention`."""
    problem, seen = _draw(draws, dense=True)
    start, end = seen
    _check(draws, problem, lambda q, k, v, sink: dense_attention(
        q, k, v, scale=problem.scale, softcap=problem.softcap, sink_logits=sink, key_start=start, key_end=end,
        impl=draws.notes["impl"],
    ))  # fmt: skip


def fuzz_sparse(draws: Draws) -> None:
    """One call of `sparse_attention` over plain tensors."""
    problem, (indices, _) = _draw(draws, dense=False)
    assert indices is not None
    _check(draws, problem, lambda q, k, v, sink: sparse_attention(
        q, k, v, indices, scale=problem.scale, softcap=problem.softcap, sink_logits=sink, impl=draws.notes["impl"]
    ))  # fmt: skip


def fuzz_packed(draws: Draws) -> None:
    """One call of `sparse_attention` over FP8 rows, in one piece or in pages."""
    impl = draws.implementation()
    # The Triton kernel reads scales at multiples of four bytes.
    latent, rope = 4 * draws.size(8, 40), 2 * draws.whole(0, 6)
    batch, tokens, keys = draws.whole(1, 2), draws.size(2, 9), draws.size(9, 140)
    heads, dim = draws.size(3, 20), latent + rope
    scale = draw_scale(draws, dim)
    q, rows = draw_queries_and_keys(
        draws, (batch, tokens, heads, dim), (batch, keys, 1, dim), dim**-0.5 if scale is None else scale, torch.float32
    )
    if draws.notes["q_size"] > 1e-4:
        _poison(draws, rows, 0.1)
    packed = pack_latents(torch.from_numpy(rows[:, :, 0]).float(), latent, impl="reference")
    # A row that was not written by us may hold any byte.
    if draws.chance(0.2):
        packed.data[0, draws.whole(0, keys - 1), :latent] = torch.from_numpy(
            draws.numbers.integers(0, 255, latent)
        ).byte()
    indices = _indices(draws, batch, tokens, keys)
    stored: PackedLatents | PagedLatents = packed
    if draws.chance(0.4):
        stored = _in_pages(draws, packed)
    sinks = draw_sinks(draws, heads)
    decoded = packed.unpack().unsqueeze(2)
    draws.note(shape=f"B{batch} T{tokens} S{keys} H{heads} L{latent} R{rope}", paged=stored is not packed)
    problem = Problem(
        draws.lay_out(q, draws.pick(draws.floats)), decoded, decoded[..., :latent],
        None if sinks is None else draws.lay_out(sinks, torch.float32),
        scale, _softcap(draws), _selected(indices), impl == "triton",
    )  # fmt: skip
    with torch.no_grad():
        out, lse = sparse_attention(
            problem.q, stored, None, indices, scale=scale, softcap=problem.softcap, sink_logits=problem.sink, impl=impl
        )
    _compare_forward(problem, out, lse)


def _in_pages(draws: Draws, packed: PackedLatents) -> PagedLatents:
    batch, keys, width = packed.data.shape
    block = draws.pick((1, 4, 64))
    per_row = -(-keys // block)
    pages = torch.from_numpy(draws.numbers.integers(0, 255, (batch * per_row + 2, block, width))).byte()
    table = torch.from_numpy(draws.numbers.permutation(len(pages))[: batch * per_row].reshape(batch, per_row)).int()
    paged = PagedLatents(pages, table, keys, packed.latent_dim, packed.rope_dim)
    paged.write(packed)
    return paged


def _softcap(draws: Draws) -> float | None:
    return None if draws.chance(0.7) else draws.pick((1.0, 30.0, 50.0, 1e-3, 1e4, 1e-20, 1e20))


def _poison(draws: Draws, values: np.ndarray, share: float) -> bool:
    """Puts NaN and infinities into some cases' numbers; says whether."""
    if not values.size or not draws.chance(share):
        return False
    for _ in range(draws.whole(1, 3)):
        values.reshape(-1)[draws.whole(0, values.size - 1)] = draws.pick((np.nan, np.inf, -np.inf))
    return True


def _indices(draws: Draws, batch: int, tokens: int, keys: int) -> Tensor:
    """`[B, T, K]` in `[-1, S)`: in any order, ascending, with repetitions, padded anywhere or everywhere."""
    places = draws.size(8, 40, 300)
    kind = draws.pick(("any", "any", "ascending", "repeated", "nothing"))
    indices = draws.numbers.integers(-1, keys, (batch, tokens, places))
    if kind == "ascending":
        indices = np.sort(indices, axis=-1)[..., ::1]
    elif kind == "repeated":
        indices[...] = indices[..., :1]
    elif kind == "nothing":
        indices[...] = -1
    if draws.chance(0.3):
        indices[draws.numbers.random(indices.shape) < draws.pick((0.1, 0.9))] = -1
    return draws.lay_out(indices, draws.pick((torch.int32, torch.int32, torch.int64)))


def _selected(indices: Tensor) -> list[list[np.ndarray]]:
    return [[row[row >= 0] for row in rows] for rows in indices.numpy()]


def _seen(start: Tensor | None, end: Tensor | None, batch: int, tokens: int, keys: int) -> list[list[np.ndarray]]:
    """The positions in each query's range."""
    return [
        [
            np.arange(
                0 if start is None else int(start[b, t]),
                max(keys - tokens + t + 1, 0) if end is None else int(end[b, t]),
            )
            for t in range(tokens)
        ]
        for b in range(batch)
    ]


def _draw(draws: Draws, *, dense: bool) -> tuple[Problem, tuple[Tensor | None, Tensor | None]]:
    """A problem over plain tensors, and its ranges; or its indices and `None`."""
    impl = draws.implementation()
    batch, tokens, keys = draws.whole(1, 2), draws.pick((1, draws.size(9, 40))), draws.size(20, 70, 300)
    if draws.small:
        tokens, keys = min(tokens, 2), min(keys, 20)
    elif tokens == 1 and draws.chance(0.2):
        keys = draws.whole(500, 1100)
    keys = 0 if draws.chance(0.03) else keys
    groups = draws.whole(1, 3)
    heads, dim = groups * draws.size(4, 9), draws.pick((draws.size(9, 40), 16, 32))
    value_dim = draws.pick((dim, draws.size(9, 40)))
    dtype = draws.pick(draws.floats if impl != "reference" else (*draws.floats, torch.float64))
    key_dtype = dtype if dtype.itemsize == 2 else draws.pick((dtype, *draws.floats))
    scale = draw_scale(draws, dim)
    draws.note(
        shape=f"B{batch} T{tokens} S{keys} H{heads} G{groups} D{dim} Dv{value_dim}",
        dtype=(dtype, key_dtype),
        scale=scale,
    )
    narrow = torch.float16 if torch.float16 in (dtype, key_dtype) else dtype
    q, k = draw_queries_and_keys(
        draws, (batch, tokens, heads, dim), (batch, keys, groups, dim), dim**-0.5 if scale is None else scale, narrow
    )
    v = draws.normal((batch, keys, groups, value_dim), draws.pick((1.0, 1.0, 1.0, 1.0, 1.0, 1e-40, 1e-10, 100.0)))
    if dense:
        given = draws.ranges(batch, tokens, keys)
        positions = _seen(*given, batch, tokens, keys)
    else:
        indices = _indices(draws, batch, tokens, keys)
        given, positions = (indices, None), _selected(indices)
    if draws.chance(0.2):
        # What nobody sees may hold anything, and must not reach results or gradients.
        for b in range(batch):
            unseen = np.setdiff1d(np.arange(keys), np.concatenate([np.empty(0, int), *positions[b]]))
            k[b, unseen], v[b, unseen] = draws.pick((np.nan, np.inf)), draws.pick((np.nan, -np.inf))
    # Where a query times the scale vanishes in fp32, infinite keys give NaN in place of infinity.
    if draws.notes["q_size"] > 1e-4:
        for values in (q, k, v):
            _poison(draws, values, 0.06)
    sinks = draw_sinks(draws, heads)
    laid_k = draws.lay_out(k, key_dtype)
    shares = value_dim <= dim and draws.chance(0.15)
    laid_v = laid_k[..., :value_dim] if shares else draws.lay_out(v, key_dtype)
    problem = Problem(
        draws.lay_out(q, dtype), laid_k, laid_v, None if sinks is None else draws.lay_out(sinks, dtype),
        scale, _softcap(draws), positions, impl == "triton",
    )  # fmt: skip
    draws.note(softcap=problem.softcap, values_in_keys=shares)
    return problem, given


def _check(draws: Draws, problem: Problem, run: Any) -> None:
    """Results, and gradients where everything that is seen is finite."""
    leaves = [
        None if x is None else x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v, problem.sink)
    ]
    wanted = draws.chance(0.6)
    with torch.set_grad_enabled(wanted):
        out, lse = run(*leaves)
    rows = _compare_forward(problem, out, lse)
    if not wanted or not out.requires_grad or rows is None:
        return
    upstream = draws.lay_out(draws.normal(out.shape, draws.pick((1.0, 1.0, 1e-6, 100.0))), out.dtype)
    present = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(out, present, upstream)
    names = ["q", "k", "v", *(["sink_logits"] if problem.sink is not None else [])]
    for name, grad, expected in zip(names, grads, _gradients(problem, rows, numbers(upstream))):
        compare(f"gradient of {name}", grad, expected)


def _compare_forward(problem: Problem, out: Tensor, lse: Tensor) -> dict[tuple[int, int], Row] | None:
    """Checks results; returns each query's softmax, or `None` where something that is seen is not finite."""
    q, k, v = numbers(problem.q), numbers(problem.k), numbers(problem.v)
    sink = None if problem.sink is None else numbers(problem.sink)
    shared = q.shape[2] // k.shape[2]
    expected = Bounded.zeros((*q.shape[:3], v.shape[-1]))
    logs = Bounded.zeros(q.shape[:3])
    logs.exact[...] = -np.inf
    rows = {}
    finite = bool(np.isfinite(q).all()) and (sink is None or not (np.isnan(sink) | (sink == np.inf)).any())
    for b, t in np.ndindex(*q.shape[:2]):
        places = problem.positions[b][t]
        if not len(places):
            continue
        keys, values = (np.repeat(x[b, places], shared, axis=1) for x in (k, v))
        row = row_of(q[b, t], keys, problem.factor, problem.softcap, sink, problem.coarse_tanh)
        rows[b, t] = row
        finite = finite and bool(np.isfinite(keys).all() and np.isfinite(values).all())
        with np.errstate(all="ignore"):
            broken = np.asarray(~(row.scores < np.inf).all(axis=-1))
            nothing = np.asarray((row.scores == -np.inf).all(axis=-1))
            logs.exact[b, t] = np.where(broken, np.nan, np.where(nothing, -np.inf, row.lse))
            logs.error[b, t] = row.lse_error
            mixed = np.einsum("hn,nhd->hd", row.weights, values)
            mixed = np.where(np.isnan(values) & (row.weights.T[..., None] >= 0), np.nan, 0).sum(axis=0) + mixed
            largest = np.abs(np.where(np.isfinite(values), values, 0.0)).max(axis=0)
            ceiling = np.minimum(row.high.sum(axis=-1), 1.0)[:, None] * 2 * largest
            off = np.einsum("hn,nhd->hd", row.error, np.abs(np.where(np.isfinite(values), values, 0.0)))
            # Each product may be rounded to a subnormal number.
            vanished = FLUSHED * largest + len(places) * SMALLEST
            expected.error[b, t] = np.minimum(off, ceiling) + 8 * EPS * np.abs(mixed) + vanished
            mixed = np.where(broken[:, None], np.nan, np.where(nothing[:, None] & np.isfinite(mixed), 0.0, mixed))
            # A weight that fp32 flushes to zero makes NaN of an infinite value, a tiny one infinity: neither is wrong.
            expected.exact[b, t] = mixed
    compare("out", out, expected)
    compare("lse", lse, logs)
    if not np.isneginf(numbers(lse))[logs.exact == -np.inf].all():
        raise Difference("lse: must be -inf where nothing is seen")
    return rows if finite else None


def _gradients(problem: Problem, rows: dict[tuple[int, int], Row], upstream: np.ndarray) -> list[Bounded]:
    """Gradients of q, k, v and the sinks by the formulas in `sparse_attention/README.md`."""
    q, k, v = numbers(problem.q), numbers(problem.k), numbers(problem.v)
    heads, dim = q.shape[2:]
    groups, shared, scale = k.shape[2], heads // k.shape[2], problem.factor
    rounding = (dim + v.shape[-1] + 8) * EPS + 2 * torch.finfo(problem.q.dtype).eps
    grad_q, grad_k, grad_v, grad_sink = (Bounded.zeros(x) for x in (q.shape, k.shape, v.shape, (heads,)))
    terms = 16 + sum(len(places) for row in problem.positions for places in row)
    for (b, t), row in rows.items():
        places = problem.positions[b][t]
        keys, values = (np.repeat(x[b, places], shared, axis=1) for x in (k, v))
        grad = upstream[b, t]
        by_weight = np.einsum("nhd,hd->hn", values, grad)
        size = np.einsum("nhd,hd->hn", np.abs(values), np.abs(grad))
        largest = size.max(axis=-1, keepdims=True)
        mean = (row.weights * by_weight).sum(axis=-1, keepdims=True)
        # Of subnormal products, and of a result that is rounded to its dtype before it is multiplied by the gradient.
        vanished = (values.shape[-1] + 8) * SMALLEST
        rounded = smallest(problem.q.dtype) * np.abs(grad).sum(axis=-1, keepdims=True)
        some = row.high.sum(axis=-1, keepdims=True)
        mean_error = (row.error * size).sum(axis=-1, keepdims=True) + rounding * some * largest + rounded + vanished
        by_score = row.weights * (by_weight - mean) * row.slope
        off = row.error * (size + np.abs(mean) + mean_error) * np.minimum(row.slope + row.slope_error, 1.0)
        off += row.weights * (
            mean_error + rounding * (size + largest) + vanished + row.slope_error * (size + np.abs(mean))
        )
        for total, exact, error, other, factor in (
            (grad_k, by_score, off, q[b, t], scale),
            (grad_v, row.weights, row.error, grad, 1.0),
        ):
            spread = factor * exact.T[..., None] * other
            spread_error = abs(factor) * (error + terms * EPS * np.abs(exact)).T[..., None] * np.abs(other)
            # Products that become subnormal, before the scale or after it.
            largest_factor = 1 + np.abs(other) + (np.abs(exact) + error).T[..., None]
            spread_error = np.where(np.abs(exact).T[..., None] * np.abs(other) > OVERFLOWS, np.inf, spread_error)
            spread_error = spread_error + terms * SMALLEST * (1 + abs(factor)) * largest_factor
            np.add.at(total.exact[b], places, _by_group(spread, groups))
            np.add.at(total.error[b], places, _by_group(spread_error, groups))
        grad_q.exact[b, t] = scale * np.einsum("hn,nhd->hd", by_score, keys)
        grad_q.error[b, t] = abs(scale) * np.einsum("hn,nhd->hd", off + terms * EPS * np.abs(by_score), np.abs(keys))
        unscaled = np.einsum("hn,nhd->hd", np.abs(by_score) + off, np.abs(keys))
        grad_q.error[b, t] += np.where(unscaled > OVERFLOWS, np.inf, 0.0)
        grad_q.error[b, t] += terms * SMALLEST * (1 + abs(scale)) * (1 + np.abs(keys).max(axis=0))
        grad_sink.exact -= row.sink * mean[:, 0]
        grad_sink.error += row.sink_error * np.abs(mean[:, 0]) + (row.sink + row.sink_error) * mean_error[:, 0]
        grad_sink.error += terms * (EPS * np.abs(mean[:, 0]) + SMALLEST * (1 + largest[:, 0]))
    return [grad_q, grad_k, grad_v, grad_sink]


def _by_group(rows: np.ndarray, groups: int) -> np.ndarray:
    """Sums `[n, H, D]` over the query heads that share a KV head, `[n, G, D]`."""
    return rows.reshape(len(rows), groups, rows.shape[1] // groups, -1).sum(axis=2)
