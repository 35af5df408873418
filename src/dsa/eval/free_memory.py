"""Whether a long text fits into memory: what is free, without a library for it, beside what reading takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from dsa.config import DSAConfig
from dsa.cost import ModelShape, Storage, shape_from
from dsa.cost.fit import Room
from dsa.models.extension import Demand
from dsa.models.loading import LoadedModel
from dsa.models.native.acceleration import cache_of

_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
"""Old control groups say a number near this for no limit."""


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be taken on a device without pushing anything out; `None` where the system does not say.

    On a CPU: what the kernel calls available, or what a container's limit leaves if that is less; where the system
    has no such figure, as macOS, all physical memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reusable
    if device.type != "cpu":
        return None
    found = [each for each in (_of_machine(), _of_container(_CGROUPS)) if each is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _of_container(root: Path) -> int | None:
    """What the control group's limit leaves, with cached files that the kernel can drop; `None` without a limit."""
    for limit, usage, stat in (
        (root / "memory.max", root / "memory.current", root / "memory.stat"),
        (
            root / "memory" / "memory.limit_in_bytes",
            root / "memory" / "memory.usage_in_bytes",
            root / "memory" / "memory.stat",
        ),
    ):
        try:
            most, used = int(limit.read_text()), int(usage.read_text())
            droppable = dict(line.split() for line in stat.read_text().splitlines()).get("inactive_file", "0")
        except (OSError, ValueError):
            continue
        if most < _UNLIMITED:
            return max(0, most - used + int(droppable))
    return None


def check_room(loaded: LoadedModel, config: DSAConfig | None, demand: Demand, chunk: int) -> None:
    """Refuses a run whose keys and values do not fit into memory, before it begins.

    A model whose sizes `dsa.cost` does not know, and a device that does not say what is free, are let through.

    Args:
        loaded: The model, on its device.
        config: Its DSA; `None` for dense.
        demand: What is read and written.
        chunk: Tokens read in one pass.

    Raises:
        ValueError: It does not fit; the message says how many tokens of the document would.
    """
    available = available_memory(loaded.model.device)
    try:
        shape = loaded_shape(loaded)
    except ValueError:
        return
    if available is None:
        return
    room = Room(shape, config, chunk, storage_of(loaded.model))
    needed = room.bytes(demand.total)
    if needed <= available:
        return
    fitting = demand.fitting(room.tokens(available)) // 100 * 100
    advice = (
        f"about {fitting:,} tokens of the text would fit: give --tokens {fitting} or fewer --pages"
        if fitting
        else "not even a short text would fit: take a smaller model or a smaller --max-new-tokens"
    )
    raise ValueError(
        f"memory: reading {demand.prompt:,} tokens and writing up to {demand.new:,} takes about {needed / 1e9:,.1f} GB "
        f"for keys, values, index keys and one pass, and {available / 1e9:,.1f} GB are free; {advice}, or free memory"
    )


def loaded_shape(loaded: LoadedModel) -> ModelShape:
    """The sizes of a model in memory. Raises `ValueError` where `dsa.cost` does not know its architecture."""
    return shape_from(loaded.model.config.to_dict(), loaded.name)


def storage_of(model: Any) -> Storage:
    """Bytes of a number: a cache holds what the model computes with, or FP8 rows."""
    fp8_rows = cache_of(model) == "fp8"
    return Storage(model.dtype.itemsize, model.dtype.itemsize, fp8_rows=fp8_rows)
