"""Peak memory, and the description of the machine that a figure was taken on."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def reset_peak_rss() -> bool:
    """Starts a new peak of resident memory. `False` where the system cannot (only Linux can)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MB (10^6 bytes), since `reset_peak_rss` where that worked."""
    try:
        status = Path("/proc/self/status").read_text()
        kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(kibibytes) * 1024 / 1e6
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """What a figure must carry: commit, device, threads and versions."""
    described = {
        "machine": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": str(device or "cpu"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "dsa": package_version(),
        "commit": commit(),
    }
    if device is not None and device.type == "cuda":
        described["device_name"] = torch.cuda.get_device_name(device)
    return described


def cpu_name() -> str:
    """The processor's name."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return name


def package_version() -> str:
    """The version of the installed distribution, or `"unknown"` when run from a bare source tree."""
    try:
        return metadata.version("dsa-attention")
    except metadata.PackageNotFoundError:
        return "unknown"


def commit() -> str | None:
    """The commit of the checkout this package is imported from (`-dirty` if changed), `None` without one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
