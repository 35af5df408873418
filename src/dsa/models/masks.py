"""What each query may see, as a range of positions instead of a mask.

transformers asks the attention implementation for its mask once per forward. Ours is `[B, 1, T, 2]` int32, the
first visible key and one past the last, for every mask whose rows are ranges: causal, left- or right-padded,
packed, sliding, chunked, static caches. `None` stands for the operations' default, causal and right-aligned. Only
masks with holes (padding between two turns, say) come as booleans `[B, 1, T, S]`.

Shapes: `B` batch, `T` query tokens, `S` key tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

QUERY_BLOCK_ELEMENTS = 1 << 24


def visible_ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function that transformers calls for the `dsa` attention implementation.

    Args are those of `transformers.masking_utils.sdpa_mask`.

    Returns:
        `None` for causal and right-aligned; int32 `[B, 1, T, 2]` where rows are ranges; bool `[B, 1, T, S]`
        where they have holes.
    """
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
        if bool(padding.all()):
            padding = None
    ranges = None
    real = _range_of_padding(padding) if padding is not None else None
    if mask_function is causal_mask_function:
        if padding is None and isinstance(q_offset, int) and q_offset + q_length == kv_length + kv_offset:
            return None
        queries = torch.arange(q_length, device=device) + q_offset - kv_offset
        ranges = torch.zeros_like(queries)[None], (queries + 1).clamp(0, kv_length)[None]
    elif not use_vmap:
        ranges = _ranges_of_function(mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, device)
    if ranges is None or (padding is not None and real is None):
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            cast(int, q_offset),
            kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
    start, end = ranges
    if real is not None:
        start, end = torch.maximum(start, real[:, :1]), torch.minimum(end, real[:, 1:])
    start, end = torch.broadcast_tensors(torch.minimum(start, end.clamp(min=0)), end)
    return torch.stack((start, end), dim=-1).to(torch.int32)[:, None].expand(batch_size, -1, -1, -1)


def _range_of_padding(padding: torch.Tensor) -> torch.Tensor | None:
    """First visible position and one past the last, int64 `[B, 2]`, of a padding mask `[B, S]`.

    Rows in which nothing is visible get an empty range. `None` if some row has masked positions between visible
    ones. One pass over bytes, because it is done for every decoded token.
    """
    framed = F.pad(padding, (1, 1))
    rows, positions = (framed[:, 1:] != framed[:, :-1]).nonzero().unbind(1)
    if bool((rows.bincount() > 2).any()):
        return None
    ranges = torch.zeros(len(padding), 2, dtype=torch.int64, device=padding.device)
    # Row by row, the position where it becomes visible and the one where it ceases to be.
    ranges[rows[::2]] = positions.view(-1, 2)
    return ranges


def _ranges_of_function(
    mask_function: Callable[..., torch.Tensor],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Start and end of the rows of any index-based mask, `[B or 1, T]` each, or `None` if one has holes.

    The mask is evaluated in blocks of queries and never held whole.
    """
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    keys = torch.arange(kv_length, device=device)
    block = max(1, QUERY_BLOCK_ELEMENTS // max(1, batch_size * kv_length))
    starts, ends = [], []
    for begin in range(0, q_length, block):
        queries = torch.arange(begin, min(begin + block, q_length), device=device) + q_offset
        visible = mask_function(batch, head, queries[None, None, :, None], (keys + kv_offset)[None, None, None, :])
        visible = visible.expand(-1, 1, len(queries), kv_length)[:, 0]
        start = torch.where(visible, keys, kv_length).amin(dim=-1)
        end = torch.where(visible, keys + 1, 0).amax(dim=-1)
        if bool((visible.sum(dim=-1) != (end - start).clamp(min=0)).any()):
            return None
        starts.append(torch.minimum(start, end))
        ends.append(end)
    return torch.cat(starts, dim=1), torch.cat(ends, dim=1)


def split_mask(
    mask: torch.Tensor | None, tokens: int, keys: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Ranges and holes from the mask that an attention function receives.

    Args:
        mask: What `visible_ranges` returned, or a user's own `[B, 1, T, S]` mask: boolean (`True` is visible)
            or additive (zero is visible).
        tokens: `T`.
        keys: `S`.

    Returns:
        `key_start, key_end` int32 `[B, T]`, both `None` for the default; and the visible keys bool `[B, S]`
        where rows have holes, else `None`.

    Raises:
        NotImplementedError: The mask is not a range of positions in each row minus the same keys for all.
    """
    if mask is None:
        return None, None, None
    if mask.dtype == torch.int32 and mask.shape[-1] == 2:
        return mask[:, 0, :, 0], mask[:, 0, :, 1], None
    visible = mask if mask.dtype == torch.bool else mask == 0
    visible = visible[:, 0, :, :keys]
    if mask.shape[1] != 1 and not bool((mask == mask[:, :1]).all()):
        raise NotImplementedError("dsa: attention masks that differ between heads are not supported")
    positions = torch.arange(keys, device=mask.device)
    start = torch.where(visible, positions, keys).amin(dim=-1)
    end = torch.where(visible, positions + 1, 0).amax(dim=-1)
    start = torch.minimum(start, end)
    kept = visible.any(dim=1)
    in_range = (positions >= start[..., None]) & (positions < end[..., None])
    if not bool((visible == (in_range & kept[:, None])).all()):
        raise NotImplementedError(
            f"dsa: this {tokens} x {keys} attention mask is neither causal with padding, nor packed, nor a window; "
            "pass a 2-D padding mask, or position_ids for packed documents"
        )
    return start.to(torch.int32), end.to(torch.int32), kept
