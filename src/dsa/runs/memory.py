"""What memory is free, without a library for it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

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
