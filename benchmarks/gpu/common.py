"""What the GPU benchmarks share: timing, memory, errors, the device's ceilings, and what a figure must carry."""

from __future__ import annotations

import datetime
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from dsa.ops import triton_support

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Row = dict[str, Any]


def milliseconds(launch: Callable[[], object], repeats: int = 20) -> float:
    """Median time between device events after warm-up; on a CPU one run, which measures nothing worth reading."""
    if DEVICE.type == "cuda":
        return triton_support.milliseconds(launch, repeats)
    begin = time.perf_counter()
    launch()
    return 1e3 * (time.perf_counter() - begin)


def replayed(launches: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Milliseconds of one launch out of a captured graph that runs all of them, each on data of its own.

    The sets together should exceed the L2, so that none finds its data there.
    """
    for launch in launches:
        launch()
    if DEVICE.type != "cuda":
        return milliseconds(launches[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return milliseconds(graph.replay, repeats) / len(launches)


def extra_memory(launch: Callable[[], object]) -> float:
    """Peak megabytes beyond what was allocated before; what is returned counts too."""
    if DEVICE.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    launch()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def normal(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Fresh random numbers."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(sizes, generator=generator, device=DEVICE, dtype=dtype)


def error(actual: Tensor, exact: Tensor) -> float:
    """Relative error in the norm; NaN if anything is NaN."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def expect(what: str, form: str, errors: dict[str, float], limit: float) -> Row:
    """A row of errors; stops the benchmark where one is too large, so that no figure is printed for wrong results."""
    for name, value in errors.items():
        assert value <= limit, f"{what} {form}: {name} errs by {value:.3g}, allowed {limit:.3g}"
    return {"what": what, "form": form, "shape": f"error, at most {limit:g}", **errors}


def ceilings() -> Iterator[Row]:
    """What the device reaches on a copy and on a bf16 matrix product, of random data."""
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source))
    yield {"what": "ceiling", "form": "copy", "shape": "1 GB", "ms": took, "GB/s": 8 * source.numel() / took / 1e6}
    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    took = milliseconds(lambda: a @ b)
    yield {"what": "ceiling", "form": "bf16", "shape": "8192^3", "ms": took, "TFLOP/s": 2 * 8192**3 / took / 1e9}


def environment() -> Row:
    """What a figure must carry."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    return {"device": name, "commit": commit, "date": datetime.date.today().isoformat()} | versions


def line(row: Row) -> str:
    """A row of the printed table."""
    numbers = (f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
    asked = f"  (asked: {row['asked']})" if "asked" in row else ""
    return f"{row['what']:22s} {row['form']:9s} {row['shape']:38s} " + "  ".join(numbers) + asked
