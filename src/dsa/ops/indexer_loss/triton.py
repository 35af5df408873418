"""`indexer_loss` on NVIDIA GPUs from compute capability 8.0 on: launches the kernels of `triton_dense.py` (eq. 3) and
`triton_selected.py` (eq. 4).

Gradients are computed in the same sweep as the loss, in the forward pass; the backward pass only scales them. The
gradients of the index keys are summed atomically, so their last bits vary from run to run. Memory is
`O((T + S) * heads)` and nothing waits for the device.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `Hi`/`Di` index heads / index head dim, `H`/`G` query / KV heads,
`D` head dim, `K` selected tokens, `C` chunks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsa.ops.indexer_loss.mass import least_mass
from dsa.ops.indexer_loss.triton_dense import attention_totals, divergence, index_totals
from dsa.ops.indexer_loss.triton_selected import selected_divergence, selected_totals
from dsa.ops.ranges import VisibleRanges, ranges_for_kernels
from dsa.ops.triton_support import Config, fitting, launch_chosen, processors
from dsa.ops.triton_tiles import TILE_DTYPES, padded_width, precision, product_dtype, split_width

SCRATCH_BYTES = 128 << 20
"""What the fp32 gradients of the index queries may take before they are rounded; queries go in turns beyond that."""

_DENSE = (
    {"BLOCK_ROWS": 128, "BLOCK_KEYS": 64, "STAGES": 2, "num_warps": 8},
    {"BLOCK_ROWS": 64, "BLOCK_KEYS": 64, "STAGES": 3, "num_warps": 8},
    {"BLOCK_ROWS": 64, "BLOCK_KEYS": 64, "STAGES": 2, "num_warps": 8},
    {"BLOCK_ROWS": 64, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 4},
    {"BLOCK_ROWS": 32, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 4},
    {"BLOCK_ROWS": 16, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 4},
)
_SELECTED = (
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 64, "STAGES": 2, "num_warps": 8},
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 64, "STAGES": 3, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 4},
)


@dataclass(frozen=True)
class Constants:
    """All but the index tensors; the fields are those of `api.indexer_loss` and the ranges made from it."""

    q: Tensor
    k: Tensor
    sink_logits: Tensor | None
    indices: Tensor | None
    index_scale: float
    attention_scale: float
    softcap: float | None
    visible: VisibleRanges
    kept: VisibleRanges

    def bounds(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Start and end of what is visible and of what is compared, `[B, T]` contiguous."""
        parts = (self.visible.start, self.visible.end, self.kept.start, self.kept.end)
        first, second, third, fourth = (part.contiguous() for part in parts)
        return first, second, third, fourth


class Options(NamedTuple):
    """What is no tensor, as in `api.indexer_loss`."""

    index_scale: float
    attention_scale: float
    softcap: float | None
    sinks: int
    local: int


def indexer_loss(
    q_index: Tensor,
    k_index: Tensor,
    w_index: Tensor,
    q: Tensor,
    k: Tensor,
    sink_logits: Tensor | None,
    indices: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    query_mask: Tensor | None,
    options: Options,
) -> Tensor:
    """Scalar fp32; arguments as in `api.indexer_loss`, validated but for the values of indices and ranges.

    One operator to `torch.compile`, which CUDA graphs capture; ranges that are given are not checked then.
    """
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q_index, k_index, w_index))
    # The kernels read sinks one after the other, whatever the caller's stride.
    dense_sinks = None if sink_logits is None else sink_logits.contiguous()
    held = (None if x is None else x.detach() for x in (q, k, dense_sinks))
    loss, *_ = _loss(q_index, k_index, w_index, *held, indices, key_start, key_end, query_mask, wanted, *options)
    return loss


@torch.library.custom_op("dsa::indexer_loss_triton", mutates_args=())
def _loss(
    q_index: Tensor,
    k_index: Tensor,
    w_index: Tensor,
    q: Tensor,
    k: Tensor,
    sink_logits: Tensor | None,
    indices: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    query_mask: Tensor | None,
    wanted: bool,
    index_scale: float,
    attention_scale: float,
    softcap: float | None,
    sinks: int,
    local: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients by the three index tensors, without elements where they are not wanted."""
    batch, tokens = q_index.shape[:2]
    visible = ranges_for_kernels("indexer_loss", key_start, key_end, batch, tokens, k.shape[1], q.device)
    if query_mask is not None:
        # A query that does not count sees nothing.
        seen = visible.start * query_mask, visible.end * query_mask
        visible = VisibleRanges(*seen, visible.host_start, visible.host_end)
    kept = visible.shrink(sinks, local)
    constants = Constants(q, k, sink_logits, indices, index_scale, attention_scale, softcap, visible, kept)
    loss, grads = loss_and_gradients(q_index, k_index, w_index, constants, wanted, None)
    first, second, third = grads if wanted else (x.new_empty(0) for x in (q_index, k_index, w_index))
    return loss, first, second, third


@_loss.register_fake
def _(
    q_index: Tensor,
    k_index: Tensor,
    w_index: Tensor,
    q: Tensor,
    k: Tensor,
    sink_logits: Tensor | None,
    indices: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    query_mask: Tensor | None,
    wanted: bool,
    index_scale: float,
    attention_scale: float,
    softcap: float | None,
    sinks: int,
    local: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = (x.shape if wanted else (0,) for x in (q_index, k_index, w_index))
    grads = (torch.empty(size, dtype=x.dtype, device=x.device) for size, x in zip(sizes, (q_index, k_index, w_index)))
    first, second, third = grads
    return torch.empty((), dtype=torch.float32, device=q_index.device), first, second, third


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


@once_differentiable
def _differentiate(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = (
        (grad * grad_loss).to(grad.dtype) if needed else None
        for grad, needed in zip(ctx.saved_tensors, ctx.needs_input_grad)
    )
    return (*grads, *[None] * 13)


_loss.register_autograd(_differentiate, setup_context=_save)


def loss_and_gradients(
    q_index: Tensor, k_index: Tensor, w_index: Tensor, constants: Constants, wanted: bool, config: Config | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and, where wanted, its gradients by the three index tensors, in their dtypes."""
    shapes = (q_index, k_index, w_index) if wanted else ()
    grads = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in shapes)
    batch, tokens = q_index.shape[:2]
    empty = not batch * tokens * constants.k.shape[1]
    if empty or (constants.indices is not None and not constants.indices.shape[-1]):
        return torch.zeros((), device=q_index.device), grads
    dense = constants.indices is None
    run = _dense if dense else _selected

    def launch(config: Config) -> Tensor:
        return run(q_index, k_index, w_index, constants, grads, config)

    kernel = f"indexer_loss {'dense' if dense else 'selected'}"
    shape = (*q_index.shape[2:], *constants.q.shape[2:], *constants.k.shape[1:3], str(q_index.dtype), wanted)
    configs = _candidates(q_index, k_index, constants) if config is None else [config]
    with torch.cuda.device(q_index.device if q_index.is_cuda else -1):
        return launch_chosen(kernel, shape, configs, q_index.device, launch), grads


def _candidates(q_index: Tensor, k_index: Tensor, constants: Constants) -> list[Config]:
    """Those whose tiles fit shared memory."""
    main = padded_width(constants.q.shape[-1]) * product_dtype(constants.q, constants.k).itemsize
    index = padded_width(q_index.shape[-1]) * product_dtype(q_index, k_index).itemsize

    def dense_bytes(config: Config) -> int:
        rows = config["BLOCK_ROWS"] + config["BLOCK_KEYS"]
        return max(config["STAGES"] * rows * max(main, index), 1) + config["BLOCK_KEYS"] * (index + 4 * rows)

    def selected_bytes(config: Config) -> int:
        queries = config["BLOCK_HEADS"] * main + _padded_heads(q_index) * (index + 4 * config["BLOCK_KEYS"])
        return queries + config["STAGES"] * config["BLOCK_KEYS"] * (main + index)

    if constants.indices is None:
        return fitting(_DENSE, dense_bytes, q_index.device)
    shared = constants.q.shape[2] // constants.k.shape[2]
    useful = [c for c in _SELECTED if c["BLOCK_HEADS"] <= max(16, triton.next_power_of_2(shared))]
    return fitting(useful, selected_bytes, q_index.device)


def _padded_heads(q_index: Tensor) -> int:
    return max(16, triton.next_power_of_2(q_index.shape[2]))


def _main_sizes(constants: Constants) -> dict[str, Any]:
    """Constants of the kernels that describe the main attention."""
    offsets, widths = split_width(constants.q.shape[-1], 512)
    dtype = product_dtype(constants.q, constants.k)
    return {
        "HEADS": constants.q.shape[2],
        "GROUPS": constants.k.shape[2],
        "SIZE": constants.q.shape[-1],
        "OFFSETS": offsets,
        "WIDTHS": widths,
        "HAS_SOFTCAP": constants.softcap is not None,
        "DTYPE": TILE_DTYPES[dtype],
        "PRECISION": precision(dtype),
    }


def _count(masses: Tensor) -> tuple[Tensor, Tensor]:
    """Mass of each query summed over its heads `[B, T]`, and one over the number of queries that have any."""
    mass = masses.sum(dim=1)
    mass = mass.masked_fill(mass < least_mass(mass.dtype), 0.0)
    # NaN is not zero: it reaches the loss.
    return mass, 1.0 / (mass != 0).sum().clamp_min(1).float()


def _dense(
    q_index: Tensor,
    k_index: Tensor,
    w_index: Tensor,
    constants: Constants,
    grads: tuple[Tensor, ...],
    config: Config,
) -> Tensor:
    q, k = constants.q, constants.k
    batch, tokens, index_heads, index_dim = q_index.shape
    heads, keys, device = q.shape[2], k.shape[1], q_index.device
    log_totals, masses = torch.empty(2, batch, heads, tokens, dtype=torch.float32, device=device)
    index_log_totals = torch.empty(batch, tokens, dtype=torch.float32, device=device)
    bounds = constants.bounds()
    blocks = triton.cdiv(tokens, config["BLOCK_ROWS"])
    softcap = constants.softcap or 1.0
    main = _main_sizes(constants)
    offsets, widths = split_width(index_dim, 128)
    dtype = product_dtype(q_index, k_index)
    attention_totals[(blocks, heads, batch)](
        q, k, constants.sink_logits, *bounds, log_totals, masses, q.stride(), k.stride(), tokens,
        constants.attention_scale, softcap, HAS_SINK=constants.sink_logits is not None, **main, **config,
    )  # fmt: skip
    index_totals[(blocks, batch)](
        q_index, k_index, w_index, *bounds[2:], index_log_totals,
        q_index.stride(), k_index.stride(), w_index.stride(), tokens, constants.index_scale,
        HEADS=index_heads, SIZE=index_dim, OFFSETS=offsets, WIDTHS=widths,
        DTYPE=TILE_DTYPES[dtype], PRECISION=precision(dtype), **config,
    )  # fmt: skip
    mass, share = _count(masses)

    per_token = 4 * batch * index_heads * (index_dim + 1)
    tokens_at_once = max(config["BLOCK_ROWS"], min(tokens, SCRATCH_BYTES // per_token)) if grads else tokens
    chunks = _key_chunks(triton.cdiv(tokens_at_once, config["BLOCK_ROWS"]) * batch, keys, config, device)
    per_chunk = triton.cdiv(triton.cdiv(keys, chunks), config["BLOCK_KEYS"]) * config["BLOCK_KEYS"]
    losses = torch.empty(chunks, batch, tokens, dtype=torch.float32, device=device)
    grad_k = torch.zeros(k_index.shape if grads else (1,), dtype=torch.float32, device=device)
    for first in range(0, tokens, tokens_at_once):
        here = min(tokens_at_once, tokens - first)
        shape = (batch, here, index_heads) if grads else (1,)
        grad_w = torch.zeros(shape, dtype=torch.float32, device=device)
        grad_q = torch.zeros((*shape, index_dim), dtype=torch.float32, device=device)
        divergence[(triton.cdiv(here, config["BLOCK_ROWS"]), chunks, batch)](
            q_index, k_index, w_index, q, k, *bounds[2:], log_totals, mass, index_log_totals, share, losses,
            grad_q, grad_k, grad_w,
            q_index.stride(), k_index.stride(), w_index.stride(), q.stride(), k.stride(),
            tokens, keys, first, here, per_chunk, constants.index_scale, constants.attention_scale, softcap,
            INDEX_HEADS=index_heads, INDEX_SIZE=index_dim, INDEX_OFFSETS=offsets, INDEX_WIDTHS=widths,
            INDEX_DTYPE=TILE_DTYPES[dtype], INDEX_PRECISION=precision(dtype), GRADIENTS=bool(grads),
            **main, **config,
        )  # fmt: skip
        if grads:
            grads[0][:, first : first + here] = grad_q
            grads[2][:, first : first + here] = grad_w
    if grads:
        grads[1].copy_(grad_k)
    return losses.sum() * share


def _key_chunks(programs: int, keys: int, config: Config, device: torch.device) -> int:
    """Into how many parts the keys are cut so that about four programs run on every multiprocessor."""
    available = processors(device.index or 0) if device.type == "cuda" else 1
    most = triton.cdiv(keys, 8 * config["BLOCK_KEYS"])
    return max(1, min(32, most, triton.cdiv(4 * available, programs)))


def _selected(
    q_index: Tensor,
    k_index: Tensor,
    w_index: Tensor,
    constants: Constants,
    grads: tuple[Tensor, ...],
    config: Config,
) -> Tensor:
    q, k, indices = constants.q, constants.k, constants.indices
    assert indices is not None
    batch, tokens, index_heads, index_dim = q_index.shape
    heads, groups, keys, device = q.shape[2], k.shape[2], k.shape[1], q_index.device
    log_totals, masses = torch.empty(2, batch, heads, tokens, dtype=torch.float32, device=device)
    bounds = constants.bounds()
    softcap = constants.softcap or 1.0
    main = _main_sizes(constants)
    offsets, widths = split_width(index_dim, 128)
    dtype = product_dtype(q_index, k_index)
    head_blocks = triton.cdiv(heads // groups, config["BLOCK_HEADS"])
    selected_totals[(batch * tokens * groups * head_blocks,)](
        q, k, constants.sink_logits, indices, *bounds, log_totals, masses,
        q.stride(), k.stride(), indices.stride(), tokens, keys, indices.shape[-1],
        constants.attention_scale, softcap, HAS_SINK=constants.sink_logits is not None, **main, **config,
    )  # fmt: skip
    mass, share = _count(masses)
    losses = torch.empty(batch, tokens, dtype=torch.float32, device=device)
    grad_k = torch.zeros(k_index.shape if grads else (1,), dtype=torch.float32, device=device)
    grad_q, grad_w = (grads[0], grads[2]) if grads else (losses, losses)
    selected_divergence[(batch * tokens,)](
        q_index, k_index, w_index, q, k, indices, *bounds, log_totals, mass, share, losses, grad_q, grad_k, grad_w,
        q_index.stride(), k_index.stride(), w_index.stride(), q.stride(), k.stride(), indices.stride(),
        tokens, keys, indices.shape[-1], constants.index_scale, constants.attention_scale, softcap,
        INDEX_HEADS=index_heads, BLOCK_INDEX_HEADS=_padded_heads(q_index),
        INDEX_SIZE=index_dim, INDEX_OFFSETS=offsets, INDEX_WIDTHS=widths,
        INDEX_DTYPE=TILE_DTYPES[dtype], INDEX_PRECISION=precision(dtype), GRADIENTS=bool(grads),
        **main, **config,
    )  # fmt: skip
    if grads:
        grads[1].copy_(grad_k)
    return losses.sum() * share
