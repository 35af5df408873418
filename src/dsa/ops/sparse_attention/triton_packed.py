"""`sparse_attention` over FP8 rows on NVIDIA GPUs from compute capability 8.0 on: launches `triton_packed_forward.py`.

One custom operator of torch; nothing in here waits for the device, so that CUDA graphs capture it, paged or not.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H` heads, `L`/`R` latent / rotated dims, `K` selected tokens,
`P` pages, `N` entries of a table's row, `X` splits.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dsa.ops.packed_latents.types import GROUP, PackedLatents, scales_of
from dsa.ops.paging.types import PagedLatents
from dsa.ops.sparse_attention.triton_configs import split_count
from dsa.ops.sparse_attention.triton_forward import merge_splits
from dsa.ops.sparse_attention.triton_packed_forward import attend_packed
from dsa.ops.triton_support import Config, capability, fitting, has_fp8, launch_chosen, on
from dsa.ops.triton_tiles import TILE_DTYPES, Parts, padded_width, split_width

# Best guesses first. A decoded tile passes through registers and lies next to the bytes in flight, so tiles have fewer
# keys than with rows of 16 bits; these spill little or nothing.
_MANY_HEADS = (
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 32, "STAGES": 3, "num_warps": 8},
    {"BLOCK_HEADS": 64, "BLOCK_KEYS": 32, "STAGES": 4, "num_warps": 8},
    {"BLOCK_HEADS": 32, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 8},
    {"BLOCK_HEADS": 32, "BLOCK_KEYS": 16, "STAGES": 3, "num_warps": 8},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 4, "num_warps": 4},
)
_FEW_HEADS = (
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 3, "num_warps": 8},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 4, "num_warps": 4},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 8},
)
_FLOAT32 = (
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 2, "num_warps": 8},
    {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 8},
)


def packed_attention(
    q: Tensor,
    rows: PackedLatents | PagedLatents,
    indices: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as in `api.sparse_attention`, validated but for the values of the indices and of the block table.

    What lies outside, an index or the page of one, is skipped. bf16 queries are multiplied in bf16, fp16 ones in tf32,
    which has fp16's mantissa and room for the scales, fp32 ones as three tf32 products; sums are fp32. No gradient.
    """
    if isinstance(rows, PagedLatents):
        data, table, page = rows.pages.flatten(0, 1), rows.block_table, rows.block
    else:
        data, table, page = rows.data, None, 0
    # The kernels read them one after the other, whatever the caller's stride.
    dense_sinks = None if sink_logits is None else sink_logits.contiguous()
    return _packed(q, data, table, indices, dense_sinks, rows.shape[1], page, rows.latent_dim, scale, softcap)


@torch.library.custom_op("dsa::packed_attention_triton", mutates_args=())
def _packed(
    q: Tensor,
    data: Tensor,
    table: Tensor | None,
    indices: Tensor,
    sink_logits: Tensor | None,
    keys: int,
    page: int,
    latent_dim: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    return forward(q, data, table, indices, sink_logits, keys, page, latent_dim, scale, softcap)


@_packed.register_fake
def _(
    q: Tensor,
    data: Tensor,
    table: Tensor | None,
    indices: Tensor,
    sink_logits: Tensor | None,
    keys: int,
    page: int,
    latent_dim: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(*q.shape[:3], latent_dim, dtype=q.dtype, device=q.device)
    return out, torch.empty(*q.shape[:3], dtype=torch.float32, device=q.device)


def forward(
    q: Tensor,
    data: Tensor,
    table: Tensor | None,
    indices: Tensor,
    sink_logits: Tensor | None,
    keys: int,
    page: int,
    latent_dim: int,
    scale: float,
    softcap: float | None,
    splits: int | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """`out[B, T, H, L]` and `lse[B, T, H]`.

    Args:
        data: uint8 `[B, S, row_bytes]`, or with a table `[P * page, row_bytes]`.
        keys: `S`.
        page: Tokens of a page; 0 without a table.
        splits: Into how many parts each selection is cut; `None` takes as many as fill the device.
        config: Sizes to use instead of the chosen ones.
    """
    out = torch.empty(*q.shape[:3], latent_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not out.numel() or not keys or not data.shape[0] or not indices.shape[-1]:
        return out.zero_(), lse.fill_(-torch.inf)
    if data.stride(-1) != 1 or any(stride % 4 for stride in data.stride()[:-1]) or data.data_ptr() % 4:
        # Numbers of four bytes can be read where they lie only at multiples of four.
        data = data.clone(memory_format=torch.contiguous_format)

    def launch(config: Config) -> None:
        _launch(q, data, table, indices, sink_logits, keys, page, scale, softcap, out, lse, splits, config)

    tokens = triton.next_power_of_2(min(q.shape[0] * q.shape[1], 4096))
    shape = (str(q.dtype), q.shape[2], q.shape[3], latent_dim, page > 0, tokens, indices.shape[-1])
    configs = candidates(q, data.shape[-1]) if config is None else [config]
    launch_chosen("packed_attention", shape, configs, q.device, launch)
    return out, lse


def _launch(
    q: Tensor,
    data: Tensor,
    table: Tensor | None,
    indices: Tensor,
    sink_logits: Tensor | None,
    keys: int,
    page: int,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
    splits: int | None,
    config: Config,
) -> None:
    batch, tokens, heads, head_dim = q.shape
    latent_dim, selected, rows = out.shape[-1], indices.shape[-1], batch * tokens
    programs = rows * triton.cdiv(heads, config["BLOCK_HEADS"])
    if splits is None:
        splits = split_count(programs, selected, config["BLOCK_KEYS"], q.device)
    per_split = triton.cdiv(triton.cdiv(selected, splits), config["BLOCK_KEYS"]) * config["BLOCK_KEYS"]
    parts, logs = out, lse
    if splits > 1:
        parts = torch.empty(splits, rows, heads, latent_dim, dtype=torch.float32, device=q.device)
        logs = torch.empty(splits, rows, heads, dtype=torch.float32, device=q.device)

    end = latent_dim + 4 * scales_of(latent_dim)
    codes, scales = data[..., :latent_dim], data[..., latent_dim:end].view(torch.float32)
    rotated = data[..., end:].view(torch.bfloat16)
    if has_fp8(q.device):
        codes = codes.view(torch.float8_e4m3fn)
    # A pool has no batch: all rows of the batch begin where it begins.
    row_strides = [(*((0,) if table is not None else ()), *part.stride())[:2] for part in (codes, scales, rotated)]
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    offsets, widths = _latent_parts(latent_dim)
    rope_offsets, rope_widths = split_width(head_dim - latent_dim, 128)
    with on(q.device):
        attend_packed[(programs * splits,)](
            q, codes, scales, rotated, indices, indices if table is None else table, sink_logits, parts, logs,
            q.stride(), *row_strides, indices.stride(), (0, 0) if table is None else table.stride(),
            tokens, keys, data.shape[0] // max(1, page), selected, per_split, rows, scale, softcap or 1.0,
            HEADS=heads, LATENT=latent_dim, OFFSETS=offsets, WIDTHS=widths, GROUP=GROUP,
            ROPE=head_dim - latent_dim, ROPE_OFFSETS=rope_offsets, ROPE_WIDTHS=rope_widths, PAGE=page,
            CODE_FACTOR=256.0 if codes.dtype == torch.uint8 else 1.0, SPLITS=splits,
            HAS_SINK=sink_logits is not None, HAS_SOFTCAP=softcap is not None,
            DTYPE=TILE_DTYPES[dtype], PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", **config,
        )  # fmt: skip
        if splits > 1:
            block = min(128, triton.next_power_of_2(latent_dim))
            merge_splits[(rows * heads, triton.cdiv(latent_dim, block))](
                parts, logs, sink_logits, out, lse, rows,
                HEADS=heads, V_SIZE=latent_dim, SPLITS=splits, PADDED_SPLITS=triton.next_power_of_2(splits),
                HAS_SINK=sink_logits is not None, BLOCK=block,
            )  # fmt: skip


def _latent_parts(latent_dim: int) -> Parts:
    """Parts of a row's latent dims, none of which reaches into two groups."""
    offsets: list[int] = []
    widths: list[int] = []
    for group in range(0, latent_dim, GROUP):
        inner = split_width(min(GROUP, latent_dim - group), GROUP)
        offsets += [group + offset for offset in inner[0]]
        widths += inner[1]
    return tuple(offsets), tuple(widths)


def candidates(q: Tensor, row_bytes: int) -> list[Config]:
    """Those whose queries, bytes in flight, decoded rows and weights fit shared memory."""
    itemsize = 2 if q.dtype == torch.bfloat16 else 4
    columns = padded_width(q.shape[-1])

    def bytes_of(config: Config) -> int:
        heads, places = config["BLOCK_HEADS"], config["BLOCK_KEYS"]
        return itemsize * (heads * columns + places * columns + heads * places) + config["STAGES"] * places * row_bytes

    if itemsize == 4:
        return fitting(_FLOAT32, bytes_of, q.device)
    configs: tuple[Config, ...] = _FEW_HEADS if q.shape[2] <= 16 else _MANY_HEADS
    if q.is_cuda and capability(q.device.index or 0)[0] not in (9, 10):
        # Matrix instructions of single warps need the operands in registers too: 64 heads spill.
        configs = tuple(config for config in configs if config["BLOCK_HEADS"] <= 32)
    return fitting(configs, bytes_of, q.device)
