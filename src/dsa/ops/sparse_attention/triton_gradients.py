"""The backward pass of `sparse_attention` on NVIDIA GPUs, in bounded memory: launches what `triton_backward.py` has.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values,
`K` selected tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
from torch import Tensor

from dsa.ops.sparse_attention.triton_backward import attend_backward, sum_by_key
from dsa.ops.sparse_attention.triton_configs import backward_candidates, shape_key, values_in_keys
from dsa.ops.triton_support import Config, launch_chosen, on
from dsa.ops.triton_tiles import TILE_DTYPES, product_dtype, split_width

SCRATCH_BYTES = 384 << 20
"""What the fp32 sums of the backward pass may take at once. Beyond that KV heads go in turns, then keys and values, and
in a fixed order queries."""


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sink_logits: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `q, k, v, sink_logits` in their dtypes, contiguous; without sinks the last one is empty.

    The gradients of keys and values are summed in fp32, by default atomically and so in an order that varies from run
    to run; `torch.use_deterministic_algorithms(True)` makes the order fixed, for more memory traffic.
    """
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sink_grad = q.new_empty(0) if sink_logits is None else torch.zeros_like(sink_logits)
    if not out.numel() or not k.shape[1] or not indices.shape[-1]:
        return grad_q, grad_k, grad_v, sink_grad
    delta = torch.empty_like(lse)

    def launch(config: Config) -> None:
        _launch_backward(
            grad_out, q, k, v, indices, sink_logits, out, lse, scale, softcap, grad_q, grad_k, grad_v, delta, config
        )  # fmt: skip

    shape = (q.shape[2], k.shape[2], *shape_key(q, k, v), indices.shape[-1])
    configs = backward_candidates(q, k, v) if config is None else [config]
    launch_chosen("sparse_attention backward", shape, configs, q.device, launch)
    if sink_logits is not None:
        logits = sink_logits.float()
        share = (logits - torch.logaddexp(lse, logits)).exp()
        sink_grad = -(share * delta).sum(dim=(0, 1)).to(sink_logits.dtype)
    return grad_q, grad_k, grad_v, sink_grad


def _launch_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sink_logits: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    delta: Tensor,
    config: Config,
) -> None:
    batch, tokens, heads, head_dim = q.shape
    keys, groups = k.shape[1:3]
    rows, value_dim, selected = batch * tokens, v.shape[-1], indices.shape[-1]
    head_blocks = triton.cdiv(heads // groups, config["BLOCK_HEADS"])
    # The query gradient of a wide head fills the registers; what is left holds parts of 64 columns of the others.
    widest = 64 if head_dim > 256 else 128
    offsets, widths = split_width(head_dim, widest)
    v_offsets, v_widths = split_width(value_dim, widest)
    dtype = product_dtype(q, k, v)
    deterministic = torch.are_deterministic_algorithms_enabled()
    # 4 bytes for every column of a key and its value.
    per_group = 4 * batch * keys * (head_dim + value_dim)
    groups_at_once = max(1, min(groups, SCRATCH_BYTES // per_group))
    # One latent row cannot be split by heads: its gradients as key and as value take a sweep each.
    sweeps = [("k", "v")] if per_group <= SCRATCH_BYTES else [("k",), ("v",)]
    sizes, results = {"k": head_dim, "v": value_dim}, {"k": grad_k, "v": grad_v}
    for first_group in range(0, groups, groups_at_once):
        here = min(groups_at_once, groups - first_group)
        for wanted in sweeps:
            sums = {
                name: torch.zeros(batch, keys, here, sizes[name], dtype=torch.float32, device=q.device)
                for name in wanted
            }
            rows_at_once = rows
            if deterministic:
                per_row = 4 * groups_at_once * head_blocks * selected * sum(sizes[name] for name in wanted)
                rows_at_once = max(1, min(rows, SCRATCH_BYTES // 3 // per_row))
            for first_row in range(0, rows, rows_at_once):
                rows_here = min(rows_at_once, rows - first_row)
                programs = rows_here * here * head_blocks
                targets = sums
                if deterministic:
                    targets = {
                        name: torch.empty(programs, selected, sizes[name], dtype=torch.float32, device=q.device)
                        for name in wanted
                    }
                with on(q.device):
                    attend_backward[(programs,)](
                        q, k, v, indices, sink_logits, out, lse, grad_out, grad_q,
                        targets.get("k", delta), targets.get("v", delta), delta,
                        q.stride(), k.stride(), v.stride(), indices.stride(), grad_out.stride(),
                        tokens, keys, selected, first_row, first_group, scale, softcap or 1.0,
                        HEADS=heads, GROUPS=groups, GROUPS_HERE=here, SIZE=head_dim, OFFSETS=offsets, WIDTHS=widths,
                        V_SIZE=value_dim, V_OFFSETS=v_offsets, V_WIDTHS=v_widths,
                        VALUES_IN_KEYS=values_in_keys(k, v, widest),
                        HAS_SINK=sink_logits is not None, HAS_SOFTCAP=softcap is not None, DETERMINISTIC=deterministic,
                        WITH_KEYS="k" in wanted, WITH_VALUES="v" in wanted,
                        DTYPE=TILE_DTYPES[dtype], PRECISION="ieee", **config,
                    )  # fmt: skip
                    if deterministic:
                        pairs = zip(targets.values(), sums.values())
                        _sum_in_order(indices, first_row, rows_here, here, head_blocks, keys, pairs)
                        targets.clear()
            for name in wanted:
                # Let go before the next sweep allocates its own.
                results[name][:, :, first_group : first_group + here] = sums.pop(name)


def _sum_in_order(
    indices: Tensor,
    first_row: int,
    rows: int,
    groups: int,
    head_blocks: int,
    keys: int,
    pairs: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Adds contributions `[programs, K, D]` of some rows to sums `[B, S, groups, D]`, in the order of the rows."""
    batch, tokens, selected = indices.shape
    device = indices.device
    row = torch.arange(first_row, first_row + rows, device=device)
    chosen = indices[row // tokens, row % tokens].long()
    sentinel = batch * keys * groups
    places = (row // tokens)[:, None] * keys + chosen
    places = places[:, None] * groups + torch.arange(groups, device=device)[:, None]
    places.masked_fill_(((chosen < 0) | (chosen >= keys))[:, None], sentinel)
    # [rows, groups, head blocks, K]: the order in which programs are numbered.
    places = places[:, :, None].expand(rows, groups, head_blocks, selected).reshape(-1)
    places, order = places.sort(stable=True)
    for source, total in pairs:
        size = total.shape[-1]
        block = min(128, triton.next_power_of_2(size))
        sum_by_key[(places.numel(), triton.cdiv(size, block))](
            source, order, places, total, places.numel(), sentinel, SIZE=size, BLOCK=block
        )
