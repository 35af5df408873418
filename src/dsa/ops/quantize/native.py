"""Index keys in eight bits through the compiled kernel: one pass over each key, straight into the cache.

Shapes: `B` batch, `S` key tokens, `Di` index head dim.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from dsa.ops import native_support
from dsa.ops.quantize.types import QuantizedKeys

_pack_scalars = struct.Struct("=i4x").pack
"""What follows the tensors in `dsa_quantize_keys_args`: threads."""


def quantize_keys_int8(k: Tensor, out: QuantizedKeys | None) -> QuantizedKeys:
    """`[B, S, Di]` to int8 in `[-127, 127]`, written to `out` where given; the bytes of the reference."""
    if out is None:
        out = QuantizedKeys(torch.empty(k.shape, dtype=torch.int8), torch.empty(k.shape[:2], dtype=torch.float32))
    data = out.data if out.data.stride(-1) == 1 else torch.empty(k.shape, dtype=torch.int8)
    arguments = native_support.pack(k, data, out.scale) + _pack_scalars(native_support.threads())
    native_support.call("quantize_keys", arguments)
    if data is not out.data:
        out.data.copy_(data)
    return out
