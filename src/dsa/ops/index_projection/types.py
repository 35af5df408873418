"""What the implementations share: the weights of an indexer, its tables of angles, and how these turn.

Shapes: `B` batch, `T` tokens, `C` hidden size, `Hi`/`Di` index heads / index head dim, `R` rotated dims.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from dsa.ops.checks import describe

NORM_EPSILON = 1e-6

Rope = tuple[Tensor, Tensor]
"""`cos, sin`, each `[B or 1, T, R]`, ready to be multiplied with: dims `i` and `i + R/2` are the pair that one angle
turns, and the sines of the first half are negated. `rope_tables` makes them out of angles."""

_pack_addresses = struct.Struct("=5Q").pack


class IndexWeights:
    """The weights of one indexer.

    Made once and used for many tokens: a decoding step finds each layer's objects where the caches no longer hold
    them, so what it need not look at again is kept here.

    Args:
        query: `[Hi * Di, C]`.
        key: `[Di, C]`.
        head: `[Hi, C]`, projection to the heads' weights.
        norm: `[Di]`, LayerNorm of the key.
        norm_bias: `[Di]`.

    Raises:
        ValueError: Shapes that do not fit together.
    """

    def __init__(self, query: Tensor, key: Tensor, head: Tensor, norm: Tensor, norm_bias: Tensor) -> None:
        self.tensors = query, key, head, norm, norm_bias
        self.heads, self.dim, self.width = len(head), len(norm), key.shape[-1]
        wanted = ((self.heads * self.dim, self.width), (self.dim, self.width), (self.heads, self.width))
        shapes = tuple(tensor.shape for tensor in self.tensors)
        if not self.heads or not self.dim or shapes != (*wanted, (self.dim,), (self.dim,)):
            raise ValueError(
                "IndexWeights: they must be [Hi * Di, C], [Di, C], [Hi, C], [Di] and [Di], "
                f"got {', '.join(map(describe, self.tensors))}"
            )
        self._pointers: tuple[int, ...] = ()
        self._addresses: bytes | None = None
        self._kept: tuple[Tensor, ...] = ()

    def addresses(self) -> bytes | None:
        """Where the weights lie, for the kernel; `None` where they are not fp32, dense and on the CPU."""
        query, key, head, norm, bias = self.tensors
        pointers = (query.data_ptr(), key.data_ptr(), head.data_ptr(), norm.data_ptr(), bias.data_ptr())
        if pointers != self._pointers:
            # Their data was exchanged (`model.to`, `weight.data = ...`). Keeping what the addresses belong to keeps
            # anything else from coming to lie there.
            self._kept = tuple(tensor.detach() for tensor in self.tensors)
            fits = all(x.is_cpu and x.dtype == torch.float32 and x.is_contiguous() for x in self._kept)
            self._addresses = _pack_addresses(*pointers) if fits else None
            self._pointers = pointers
        return self._addresses


def rope_tables(cos: Tensor, sin: Tensor) -> Rope:
    """`Rope` out of the cosines and sines `[B or 1, T, R/2]` of one angle per pair."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE, as `Rope` has it, to the first `cos.shape[-1]` dims of `x`."""
    width = cos.shape[-1]
    rotated = x if width == x.shape[-1] else x[..., :width]
    turned = rotated * cos.to(x.dtype) + rotated.roll(width // 2, -1) * sin.to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)
