"""Index keys in eight bits through the compiled kernel: one pass over each key, straight into the cache.

Shapes: `B` batch, `S` key tokens, `Di` index head dim.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dsa.ops import native_support
from dsa.ops.native_support import TensorArg
from dsa.ops.quantize.types import QuantizedKeys


class _Arguments(ctypes.Structure):
    """`dsa_quantize_keys_args` of `csrc/include/dsa/quantize.h`."""

    _fields_ = (("keys", TensorArg), ("data", TensorArg), ("scale", TensorArg), ("threads", ctypes.c_int32))


def quantize_keys_int8(k: Tensor, out: QuantizedKeys | None) -> QuantizedKeys:
    """`[B, S, Di]` to int8 in `[-127, 127]`, written to `out` where given; the bytes of the reference."""
    if out is None:
        out = QuantizedKeys(torch.empty(k.shape, dtype=torch.int8), torch.empty(k.shape[:2], dtype=torch.float32))
    data = out.data if out.data.stride(-1) == 1 else torch.empty(k.shape, dtype=torch.int8)
    arguments = _Arguments(TensorArg.of(k), TensorArg.of(data), TensorArg.of(out.scale), native_support.threads())
    native_support.call("quantize_keys", arguments)
    if data is not out.data:
        out.data.copy_(data)
    return out
