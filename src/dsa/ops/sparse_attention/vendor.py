"""`sparse_attention` through FlashMLA's kernels, where that library is installed: latent rows in bf16, and FP8 rows.

The library takes one KV head of 576 dims with 512 values, 64 or 128 query heads, and a multiple of 128 places; what is
missing to these is filled up here. It has no backward pass, no softcap, and reads an index out of range, so indices are
cut to the range first. Sinks are applied here from `lse`, because not every release knows them.

Shapes: `B` batch, `T` query tokens, `S` key tokens, `H` heads, `K` selected tokens, `P` pages.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa.ops import vendor_support
from dsa.ops.packed_latents.reference import pack_rows
from dsa.ops.packed_latents.types import PackedLatents, decode_rows, row_bytes
from dsa.ops.paging.types import BLOCK, PagedLatents

LIBRARY = "flash_mla"

_LATENT, _ROPE = 512, 64
_HEADS = (64, 128)
_PLACES = 128
_TOLERANCE = 0.02
"""Of bf16 results of the small question against fp32."""


def gap(
    q: Tensor,
    k: Tensor | PackedLatents | PagedLatents,
    v: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    places: int,
) -> str | None:
    """Why the library cannot run this input with `places` indices a query, or `None` where it can."""
    reason = vendor_support.device_gap(LIBRARY, q.device) or _shape_gap(q, k, v, softcap)
    if reason is not None:
        return reason
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (q, k, v, sinks)):
        return f"{LIBRARY} has no backward pass over selected tokens"
    factor = _to_natural(q.device, not isinstance(k, Tensor), q.shape[2], places)
    return factor if isinstance(factor, str) else None


def _shape_gap(
    q: Tensor, k: Tensor | PackedLatents | PagedLatents, v: Tensor | None, softcap: float | None
) -> str | None:
    dims, wanted = k.shape[-1], _LATENT + _ROPE
    if softcap is not None:
        return f"{LIBRARY} has no softcap"
    if q.dtype != torch.bfloat16 or q.shape[2] > _HEADS[-1]:
        return f"{LIBRARY} takes bf16 queries with at most {_HEADS[-1]} heads, got {q.dtype} with {q.shape[2]}"
    if isinstance(k, Tensor):
        assert v is not None
        latent = v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and v.shape[-1] == _LATENT
        if k.dtype != torch.bfloat16 or k.shape[2] != 1 or dims != wanted or not latent:
            return f"{LIBRARY} takes one KV head of {wanted} dims in bf16 whose first {_LATENT} are the values"
        if not k.is_contiguous():
            return f"{LIBRARY} takes keys in one piece"
        return None
    if (k.latent_dim, k.rope_dim) != (_LATENT, _ROPE):
        return f"{LIBRARY} takes rows of {row_bytes(_LATENT, _ROPE)} bytes"
    if isinstance(k, PagedLatents):
        if k.block != BLOCK or not k.pages.is_contiguous():
            return f"{LIBRARY} takes pages of {BLOCK} tokens in one piece"
    elif k.shape[1] % BLOCK or not k.data.is_contiguous():
        return (
            f"{LIBRARY} takes rows in pages of {BLOCK} tokens, and a multiple of {BLOCK} rows in one piece is that too"
        )
    return None


def _to_natural(device: torch.device, packed: bool, heads: int, places: int) -> float | str:
    """What makes the library's `lse` a natural logarithm, or why it cannot be used."""
    form = packed, _padded_heads(heads), max(places + -places % _PLACES, _PLACES)
    return vendor_support.once(LIBRARY, form, device, lambda: _ask(device, *form))


def _padded_heads(heads: int) -> int:
    return next(size for size in _HEADS if size >= heads)


def _ask(device: torch.device, packed: bool, heads: int, places: int) -> float:
    """Asks the library a small question, compares the answer with fp32, and says which factor its `lse` needs.

    Heads and places are those of the run: releases have kernels for some of them only.

    Raises:
        RuntimeError: It refuses, or answers wrongly.
    """
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(1, 1, heads, _LATENT + _ROPE, generator=generator, device=device).bfloat16()
    rows = torch.randn(1, BLOCK, _LATENT + _ROPE, generator=generator, device=device).bfloat16()
    seen = BLOCK // 2
    indices = torch.full((1, 1, places), -1, dtype=torch.int32, device=device)
    indices[..., :seen] = torch.arange(seen, device=device)
    scale = (_LATENT + _ROPE) ** -0.5
    if packed:
        data = pack_rows(rows, _LATENT, False)
        rows = decode_rows(data, _LATENT, _ROPE)
        out, lse = _decode(q, data, indices, scale)
    else:
        out, lse = _prefill(q, rows, indices, scale)
    key = rows[0, :seen].float()
    scores = q[0, 0].float() @ key.T * scale
    if not vendor_support.close(out[0, 0], scores.softmax(-1) @ key[:, :_LATENT], _TOLERANCE):
        raise RuntimeError("it gave another result than attention on a small question")
    for factor in (1.0, math.log(2.0)):
        if vendor_support.close(lse[0, 0] * factor, scores.logsumexp(-1), _TOLERANCE):
            return factor
    raise RuntimeError("it gave an lse that is neither natural nor to base 2 on a small question")


def attend(
    q: Tensor,
    k: Tensor | PackedLatents | PagedLatents,
    indices: Tensor,
    *,
    scale: float,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as in `api.sparse_attention`, validated, within `gap`; `v` is the first 512 dims of `k`.

    An index outside `[0, S)` is skipped.
    """
    batch, tokens, heads, _ = q.shape
    if not q.numel() or not k.shape[1] or not indices.shape[-1]:
        out = q.new_zeros(batch, tokens, heads, _LATENT)
        return out, torch.full((batch, tokens, heads), -torch.inf, device=q.device)
    indices = indices.masked_fill((indices < 0) | (indices >= k.shape[1]), -1).int()
    q = F.pad(q, (0, 0, 0, _padded_heads(heads) - heads))
    places = F.pad(indices, (0, -indices.shape[-1] % _PLACES), value=-1)
    if isinstance(k, Tensor):
        out, lse = _prefill(q, k.squeeze(2), places, scale)
    elif isinstance(k, PagedLatents):
        out, lse = _decode(q, k.pages.flatten(0, 1).unsqueeze(0), _in_pool(k, places), scale)
    else:
        out, lse = _decode(q, k.data, places, scale)
    empty = (indices < 0).all(dim=-1, keepdim=True)
    factor = _to_natural(q.device, not isinstance(k, Tensor), heads, indices.shape[-1])
    assert isinstance(factor, float)
    lse = (lse[:, :, :heads] * factor).masked_fill(empty, -torch.inf)
    out = out[:, :, :heads].masked_fill(empty.unsqueeze(-1), 0.0)
    if sink_logits is not None:
        share = torch.sigmoid(lse - sink_logits.float()).masked_fill(empty, 0.0)
        out = (out.float() * share.unsqueeze(-1)).to(out.dtype)
    return out, lse


def _in_pool(k: PagedLatents, indices: Tensor) -> Tensor:
    """Positions in the sequences to positions in the pool; -1 where the page lies outside. Waits for nothing."""
    position = indices.clamp_min(0).long().flatten(1)
    page = k.block_table.gather(1, position // k.block).view_as(indices)
    outside = (indices < 0) | (page < 0) | (page >= k.pages.shape[0])
    return (page * k.block + (position % k.block).view_as(indices).int()).masked_fill(outside, -1)


def _prefill(q: Tensor, rows: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """bf16 rows `[B, S, 576]`; all batch rows as one sequence of queries over one of keys."""
    batch, keys, dims = rows.shape
    first = keys * torch.arange(batch, dtype=torch.int32, device=q.device).view(-1, 1, 1)
    places = torch.where(indices < 0, indices, indices + first).flatten(0, 1).unsqueeze(1).contiguous()
    library = vendor_support.load(LIBRARY)
    out, _, lse = library.flash_mla_sparse_fwd(
        q.flatten(0, 1).contiguous(), rows.reshape(-1, 1, dims), places, scale, _LATENT
    )
    return out.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2])


def _decode(q: Tensor, data: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """FP8 rows `[B, S, 656]`, `S` a multiple of a page, or `[1, P * page, 656]` with indices into the pool."""
    pool = data.reshape(-1, BLOCK, 1, data.shape[-1])
    batch, tokens, heads, _ = q.shape
    if data.shape[0] > 1:
        first = data.shape[1] * torch.arange(batch, dtype=torch.int32, device=q.device).view(-1, 1, 1)
        indices = torch.where(indices < 0, indices, indices + first)
    library = vendor_support.load(LIBRARY)
    # With indices neither lengths nor table are looked at; older releases want them in their right shapes.
    lengths = torch.full((batch,), data.shape[1], dtype=torch.int32, device=q.device)
    table = torch.zeros(batch, 1, dtype=torch.int32, device=q.device)
    plan, splits = library.get_mla_metadata(lengths, tokens * heads, 1, heads, True, indices.shape[-1])
    out, lse = library.flash_mla_with_kvcache(
        q.contiguous(), pool, table, lengths, _LATENT, plan, splits, scale, False, True, indices.contiguous()
    )
    return out, lse.transpose(1, 2)
