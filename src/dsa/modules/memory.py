"""Memory for what decoding reads: large buffers begin at a huge page and lie on huge pages where the system has them.

Each decoded token reads thousands of scattered rows of a cache. On pages of 4 KB nearly every row costs a walk through
the page tables, and the processor's prefetching ends where a page does.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20

LEAST_BYTES = 2 * HUGE_PAGE
"""Smaller buffers are left to the allocator, which may keep them in memory that it has used before."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor as `torch.empty` makes it, placed for scattered reads.

    Only address space is added: what is never written takes no memory but for the rest of its last huge page.
    """
    device = torch.device(device)
    count = math.prod(shape)
    advise = None if device.type != "cpu" or torch.compiler.is_compiling() else _advise()
    if advise is None or count * dtype.itemsize < LEAST_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    whole = torch.empty(count + HUGE_PAGE // dtype.itemsize, dtype=dtype, device=device)
    skipped = -whole.data_ptr() % HUGE_PAGE
    whole_pages = (whole.nbytes - skipped) // mmap.PAGESIZE * mmap.PAGESIZE
    # Advice only: a system without huge pages refuses it, and nothing else changes.
    advise(whole.data_ptr() + skipped, whole_pages, mmap.MADV_HUGEPAGE)
    return whole.narrow(0, skipped // dtype.itemsize, count).view(tuple(shape))


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """The C library's `madvise` where it knows of huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
