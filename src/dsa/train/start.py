"""A start that reads already: an indexer set in closed form from what its layer attends to.

A pair of index dims with RoPE adds `Re(u . x_t * conj(v . x_s) * e^(i theta (t - s)))` to the score of query `t` and
key `s`, with complex weight vectors `u` and `v` and the pair's frequency `theta`; a dim without RoPE adds the real
`u . x_t * v . x_s`. The gradient of the loss with respect to a score is `softmax(I) - p`, so the term that lowers the
loss fastest is the first singular pair of

    M(theta) = sum over t, s of (p - softmax(I))[t, s] * e^(i theta (t - s)) * x_t x_s^T

between whitened hidden states. Terms are added one frequency after the other, slowest first, each with the step that
Newton's method gives it, and each against the softmax of what is there already: boosting, with one rank-one bilinear
form a stage. `M` is never formed; subspace iteration needs its products with a few vectors only.

The heads are ReLUs, and the fitted score is signed: head 0 takes the query and head 1 its negative, with weights of
opposite signs, whose difference is the score itself. The weights have no bias; hidden states after a norm have a
direction that is nearly constant, which least squares finds. Other heads keep their random weights.

Shapes: `S` tokens, `Q` queries of the fit, `N` hidden size, `M` width of what index queries are made of (`N`, or that
of the query's latent), `P` pairs of rotated dims, `Di` index head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa.models.context import AttentionCall
from dsa.modules.indexer import Indexer
from dsa.train.settings import LEAST_HEAD_DIM, LEAST_HEADS

RIDGE = 0.2
"""Share of the largest variance that is added to every direction before whitening."""

SUBSPACE, ITERATIONS = 4, 6

NEWTON_STEPS = 3

LARGEST_STEP = 3.0
"""Of one Newton step, in standard deviations of the term."""

QUERIES = 1024

TARGET_BYTES = 256 << 20
"""Of `p[Q, S]`: bounds `Q` at long lengths."""

BALLAST = 3.0
"""Energy of the constant dims of an index key, as a multiple of that of all others."""

LEAST_GAIN = 1e-4
"""In nats: what a term must promise to be added."""


@dataclass
class _Fit:
    """One layer's problem: everything in fp32 on the device of the layer.

    Args:
        hidden: `[S, N]`, what index keys are made of.
        asking: `[Q, M]`, what the index queries are made of: the hidden states, or the latent of the layer's own.
        rows: Positions of the queries, int64 `[Q]`.
        target: `p[Q, S]`, zero where it is not compared; rows sum to 1.
        compared: bool `[Q, S]`.
        scores: `I[Q, S]`, of the terms so far.
    """

    hidden: Tensor
    asking: Tensor
    rows: Tensor
    target: Tensor
    compared: Tensor
    scores: Tensor

    def residual(self) -> Tensor:
        """`p - softmax(I)`, `[Q, S]`."""
        return self.target - self.softmax(self.scores)

    def softmax(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.compared, -torch.inf).softmax(dim=-1)


@torch.no_grad()
def fit_indexer(
    indexer: Indexer,
    call: AttentionCall,
    rows: Tensor,
    sinks: int,
    local: int,
    query_of: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Sets an indexer from the attention that one sequence had in its layer.

    Args:
        indexer: Changed in place; in fp32, of at least `LEAST_HEADS` heads of `LEAST_HEAD_DIM` dims.
        call: What the layer computed; its first sequence is used.
        rows: Positions of the queries to learn from, ascending int64 `[n]`; each must have something to compare. If
            there are more than `QUERIES`, or than `TARGET_BYTES` allow, some at equal distances are used.
        sinks: First visible tokens that both distributions leave out.
        local: Last visible tokens that both distributions leave out.
        query_of: Main queries `[B, Q, H, D]` of some positions, where the call has none (`dsa.train.chunked`).
    """
    assert indexer.heads >= LEAST_HEADS
    assert indexer.head_dim >= LEAST_HEAD_DIM
    hidden = call.hidden_states[0].float()
    most = max(1, min(QUERIES, TARGET_BYTES // (4 * hidden.shape[0])))
    rows = rows[:: -(-len(rows) // most)]
    queries = call.query[0, rows] if query_of is None else query_of(rows[None])[0]
    fit = _make_fit(call, queries, hidden, rows, sinks, local)
    whiten_query, whiten_key = _whitening(fit.asking), _whitening(hidden)
    pairs = 0 if call.rope is None or not indexer.rope_dim else call.rope[0].shape[-1] // 2
    turned = 2 * pairs
    query_weight = torch.zeros(indexer.head_dim, fit.asking.shape[1], device=hidden.device)
    key_weight = torch.zeros(indexer.head_dim, hidden.shape[1], device=hidden.device)
    for pair in reversed(range(pairs)):
        assert call.rope is not None
        angle = torch.complex(call.rope[0][0, :, pair].float(), call.rope[1][0, :, pair + pairs].float())
        u, v = _stage(fit, whiten_query, whiten_key, angle)
        for place, part in ((pair, torch.real), (pair + pairs, torch.imag)):
            query_weight[place], key_weight[place] = part(u), part(v)
    for place in range(turned, indexer.head_dim):
        u, v = _stage(fit, whiten_query, whiten_key, None)
        query_weight[place], key_weight[place] = u.real, v.real
    _install(indexer, query_weight, key_weight, hidden, pairs)


def _make_fit(call: AttentionCall, queries: Tensor, hidden: Tensor, rows: Tensor, sinks: int, local: int) -> _Fit:
    """The target: the layer's attention summed over heads, over the positions that are compared."""
    keys, queries = call.key[0].float(), queries.float() * call.scale
    shared = queries.shape[1] // keys.shape[1]
    positions = torch.arange(keys.shape[0], device=keys.device)
    start, end = call.key_start[0, rows, None], call.key_end[0, rows, None]
    visible = (positions >= start) & (positions < end)
    compared = (positions >= start + sinks) & (positions < end - local)
    target = torch.zeros(len(rows), keys.shape[0], device=keys.device)
    for head in range(queries.shape[1]):
        logits = queries[:, head] @ keys[:, head // shared].T
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        logits.masked_fill_(~visible, -torch.inf)
        if call.sink_logits is None:
            target += logits.softmax(dim=-1)
        else:
            sink = call.sink_logits[head].float().expand(len(rows), 1)
            target += torch.cat((logits, sink), dim=1).softmax(dim=-1)[:, :-1]
    target.masked_fill_(~compared, 0.0)
    target /= target.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    asking = hidden[rows] if call.query_latent is None else call.query_latent[0, rows].float()
    return _Fit(hidden, asking, rows, target, compared, torch.zeros_like(target))


def _whitening(x: Tensor) -> Tensor:
    """`[N, N]`, symmetric: makes the second moments of `x [n, N]` nearly the identity."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return (vectors * (values.clamp_min(0) + RIDGE * values[-1]).rsqrt()) @ vectors.T


def _stage(fit: _Fit, whiten_query: Tensor, whiten_key: Tensor, angle: Tensor | None) -> tuple[Tensor, Tensor]:
    """Finds the best term of one frequency, adds it to the scores and returns its weights, complex `[M]` and `[N]`.

    Args:
        fit: The problem; its scores grow by the term.
        whiten_query: `[M, M]`.
        whiten_key: `[N, N]`.
        angle: `e^(i theta s)` for every position, complex `[S]`; `None` for a real term.
    """
    residual = fit.residual()
    if angle is None:
        angle = torch.ones(fit.hidden.shape[0], dtype=torch.complex64, device=fit.hidden.device)
        u, v = _first_singular_pair(fit, residual, whiten_query, whiten_key, angle, real=True)
    else:
        u, v = _first_singular_pair(fit, residual, whiten_query, whiten_key, angle, real=False)
    query = _times(fit.asking, u) * angle[fit.rows]
    key = _times(fit.hidden, v) * angle
    term = torch.outer(query.real, key.real) + torch.outer(query.imag, key.imag)
    step = _newton_step(fit, term)
    fit.scores += step * term
    return u * step, v


def _first_singular_pair(
    fit: _Fit, residual: Tensor, whiten_query: Tensor, whiten_key: Tensor, angle: Tensor, real: bool
) -> tuple[Tensor, Tensor]:
    """`u [M], v [N]`, complex, such that the term's inner product with the residual is greatest for whitened inputs."""
    x, some, turn = fit.hidden, fit.asking, angle[fit.rows]
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(x.shape[1], SUBSPACE, generator=generator).to(x.device, torch.complex64)

    def rotated(values: Tensor, angles: Tensor) -> Tensor:
        return values if real else values * angles[:, None]

    def forward(b: Tensor) -> Tensor:  # Whitened M applied to conjugated key vectors.
        mixed = _times(residual, rotated(_times(x, _times(whiten_key, b)), angle.conj()))
        return _times(whiten_query, _times(some.T, rotated(mixed, turn)))

    def adjoint(b: Tensor) -> Tensor:
        mixed = _times(residual.T, rotated(_times(some, _times(whiten_query, b)), turn.conj()))
        return _times(whiten_key, _times(x.T, rotated(mixed, angle)))

    if real:
        block = block.real.to(torch.complex64)
    for _ in range(ITERATIONS):
        left = torch.linalg.qr(forward(torch.linalg.qr(block).Q)).Q
        block = adjoint(left)
    # M^H left = block, so M is about left block^H, whose singular vectors are those of the small factors.
    basis, small = torch.linalg.qr(block)
    inner_left, _, inner_right = torch.linalg.svd(small.mH)
    u, v = left @ inner_left[:, 0], basis @ inner_right[0].conj()
    return _times(whiten_query, u.conj()), _times(whiten_key, v.conj())


def _times(real: Tensor, values: Tensor) -> Tensor:
    """A real matrix times complex vectors."""
    return torch.complex(real @ values.real, real @ values.imag)


def _newton_step(fit: _Fit, term: Tensor) -> float:
    """How much of a term lowers the loss most; 0 where it promises next to nothing."""
    step, spread = 0.0, None
    for _ in range(NEWTON_STEPS):
        predicted = fit.softmax(fit.scores + step * term)
        mean = (predicted * term).sum(dim=-1, keepdim=True)
        slope = ((fit.target - predicted) * term).sum(dim=-1).mean()
        curvature = (predicted * (term - mean).square()).sum(dim=-1).mean()
        if spread is None:
            if float(slope.square()) < 2 * LEAST_GAIN * float(curvature) or float(curvature) == 0:
                return 0.0
            spread = float(curvature) ** 0.5
        limit = LARGEST_STEP / spread
        step += max(-limit, min(limit, float(slope / curvature.clamp_min(1e-12))))
    return step


def _install(indexer: Indexer, query_weight: Tensor, key_weight: Tensor, hidden: Tensor, pairs: int) -> None:
    """Writes the terms into the weights of heads 0 and 1 and the index key.

    LayerNorm would make the keys of all tokens equally long, and the fitted terms are linear. So the two dims that
    matter least carry a constant, of opposite signs, that is long enough to make the length of all keys nearly the
    same; LayerNorm's own weight then hides it and gives the other dims their size back.
    """
    dim = indexer.head_dim
    ballast = (0, pairs) if pairs else (dim - 1, dim - 2)
    key_weight[ballast, :] = 0.0
    energy = (hidden @ key_weight.T).square().mean(dim=0)
    if pairs:
        both = 0.5 * (energy[:pairs] + energy[pairs : 2 * pairs])
        energy = torch.cat((both, both, energy[2 * pairs :]))
    size = energy.sqrt().clamp_min(1e-12)[:, None]
    key_weight, query_weight = key_weight / size, query_weight * size
    moments = hidden.T @ hidden / len(hidden)
    moments.diagonal().add_(1e-2 * moments.diagonal().mean())
    constant = torch.linalg.solve(moments, hidden.mean(dim=0))
    length = (BALLAST * (dim - 2) / 2) ** 0.5
    key_weight[ballast[0]], key_weight[ballast[1]] = length * constant, -length * constant
    indexer.k_norm.weight.fill_((((1 + BALLAST) * (dim - 2)) / dim) ** 0.5)
    indexer.k_norm.weight[list(ballast)] = 0.0
    indexer.k_norm.bias.zero_()
    # The scores are multiplied by Di**-0.5, the weights by Hi**-0.5; both factors share what makes up for it.
    factor = (dim * indexer.heads) ** 0.25
    indexer.wk.weight.copy_(key_weight)
    indexer.query_projection.weight[:dim] = query_weight * factor
    indexer.query_projection.weight[dim : 2 * dim] = -query_weight * factor
    for head_weights in indexer.weights_proj.weight.split(indexer.heads):  # Each selection begins as all heads' one.
        head_weights[0], head_weights[1] = constant * factor, -constant * factor
