"""What the machine can do at most: the floor that a kernel is judged by."""

from __future__ import annotations

import ctypes
import struct
import time
from dataclasses import asdict, dataclass

import torch

from dsa.ops import native_support

BUFFER_FLOATS = 1 << 28
"""1 GiB, more than any cache holds."""

SMALL_BUFFER_FLOATS = 1 << 20
_READ, _MULTIPLY_ADD, _INT8 = 0, 1, 2
_ROUNDS = 2
_TRIES = 5
_STREAMS = (1, 2)
_THOUSANDS = 2000


_pack_scalars = struct.Struct("=qQ3i4x").pack
"""What follows the tensors in `dsa_probe_args`: repeats, where the amount goes, kind, streams, threads."""


@dataclass(frozen=True)
class Limits:
    """What all threads together reach, with the instruction set in use.

    Args:
        read: Bytes a second, out of memory.
        fp32: Multiply-adds a second, in registers.
        int8: Multiply-adds of bytes into 32 bits a second, in registers.
    """

    read: float
    fp32: float
    int8: float

    def floor(self, *, bytes_read: float, fp32: float = 0.0, int8: float = 0.0) -> float:
        """Seconds that a phase takes at least: the longer of reading and computing."""
        return max(bytes_read / self.read, fp32 / self.fp32 + int8 / self.int8)

    def to_json(self) -> dict[str, float]:
        """By name and unit."""
        units = {"read": "read_gb_per_s", "fp32": "fp32_gmac_per_s", "int8": "int8_gmac_per_s"}
        return {units[name]: round(value / 1e9, 2) for name, value in asdict(self).items()}


def measure_limits(*, quick: bool = False) -> Limits | None:
    """Measures the machine with torch's number of threads; `None` without the compiled kernels.

    The best of a few runs counts, and of a few ways to read: a floor must not be too high.
    """
    if native_support.missing() is not None:
        return None
    prober = Prober(quick=quick)
    found = [prober() for _ in range(1 if quick else _TRIES)]
    return Limits(*(max(getattr(each, name) for each in found) for name in ("read", "fp32", "int8")))


class Prober:
    """Measures the limits again and again: a machine that others share does not stay the same.

    Args:
        quick: With a buffer that fits the caches, which says nothing.
    """

    def __init__(self, *, quick: bool = False) -> None:
        self._buffer = torch.ones(SMALL_BUFFER_FLOATS if quick else BUFFER_FLOATS)
        self._repeats = torch.get_num_threads() * (8 if quick else _THOUSANDS)

    def __call__(self) -> Limits:
        """What the machine does just now."""
        return Limits(
            max(_rate(_READ, 1, self._buffer, streams) for streams in _STREAMS),
            _rate(_MULTIPLY_ADD, self._repeats),
            _rate(_INT8, self._repeats),
        )


def _rate(kind: int, repeats: int, buffer: torch.Tensor | None = None, streams: int = 1) -> float:
    threads = torch.get_num_threads()
    sink = torch.empty(threads)
    amount = ctypes.c_int64()
    scalars = _pack_scalars(repeats, ctypes.addressof(amount), kind, streams, threads)
    arguments = native_support.pack(buffer, sink) + scalars
    best = float("inf")
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        native_support.call("probe", arguments)
        best = min(best, time.perf_counter() - began)
    return amount.value / best
