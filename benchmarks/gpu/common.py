"""What the GPU benchmarks share: timing, memory, errors, the device's ceilings, and what a figure must carry."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Row = dict[str, Any]


SEED = 0
"""Set to a fresh one by every run; `--seed` repeats one."""

CEILINGS: dict[str, float] = {}
"""What the device reached: `copy` in GB/s, `bf16` and `fp8` in TFLOP/s."""


def milliseconds(launch: Callable[[], object], repeats: int = 20) -> float:
    """Median time between device events after warm-up, with the L2 holding other data at each start.

    On a CPU one run, which measures nothing worth reading.
    """
    if DEVICE.type != "cuda":
        begin = time.perf_counter()
        launch()
        return 1e3 * (time.perf_counter() - begin)
    for _ in range(2):
        launch()
    # Read, not written: lines that are clean need not be brought to memory while the launch is timed.
    other = torch.zeros(2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size, dtype=torch.uint8, device=DEVICE)
    times = []
    for _ in range(repeats):
        other.amax()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


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
    """Peak megabytes beyond what was allocated before and what is returned."""
    if DEVICE.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = launch()
    torch.cuda.synchronize()
    results = result if isinstance(result, list | tuple) else (result,)
    kept = sum(x.numel() * x.element_size() for x in results if isinstance(x, Tensor))
    return (torch.cuda.max_memory_allocated() - before - kept) / 1e6


def normal(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Fresh random numbers."""
    generator = torch.Generator(DEVICE).manual_seed(SEED + seed)
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
    """What the device reaches on a copy and on matrix products of random data, in bf16 and where it can in fp8."""
    pair = torch.randn(2, 1 << 28, device=DEVICE)
    took = milliseconds(lambda: pair[0].copy_(pair[1]))
    CEILINGS["copy"] = pair.nbytes / took / 1e6
    yield {"what": "ceiling", "form": "copy", "shape": "1 GB", "ms": took, "GB/s": CEILINGS["copy"]}
    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    products: dict[str, Callable[[], Tensor]] = {"bf16": lambda: a @ b}
    if torch.cuda.get_device_capability() >= (8, 9):
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=DEVICE)
        products["fp8"] = lambda: torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16)
    for form, product in products.items():
        took = milliseconds(product)
        CEILINGS[form] = 2 * 8192**3 / took / 1e9
        yield {"what": "ceiling", "form": form, "shape": "8192^3", "ms": took, "TFLOP/s": CEILINGS[form]}


def with_floor(row: Row, moved: float, operations: float, form: str = "bf16") -> Row:
    """The row with the least time that it could take on this device, and which part of its time that is.

    Args:
        moved: Bytes that have to be read or written once.
        operations: Floating-point operations of its matrix products.
        form: Which matrix rate they run at.
    """
    if not CEILINGS:
        return row
    floor = max(moved / CEILINGS["copy"] / 1e6, operations / CEILINGS.get(form, CEILINGS["bf16"]) / 1e9)
    return row | {"floor ms": floor, "floor/ms": floor / row["ms"]}


def with_vendor(row: Row, gap: str | None, launch: Callable[[], object]) -> Row:
    """The row with the vendor's time next to it, where its library takes the input; else why not, in the JSON."""
    if gap is not None:
        return row | {"vendor": gap}
    return row | {"vendor ms": milliseconds(launch)}


def environment() -> Row:
    """What a figure must carry."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    return {"device": name, "commit": commit, "date": datetime.date.today().isoformat()} | versions


def line(row: Row) -> str:
    """A row of the printed table."""
    numbers = (f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
    return f"{row['what']:22s} {row['form']:9s} {row['shape']:38s} " + "  ".join(numbers) + verdict(row)


def verdict(row: Row) -> str:
    """What was asked of the row, `(figure, ">=" or "<=", value)` each, and whether it came."""
    said = []
    for figure, relation, value in row.get("asked", ()):
        met = row[figure] >= value if relation == ">=" else row[figure] <= value
        said.append(f"{figure} {relation} {value:g}: {'yes' if met else 'NO'}")
    return f"  ({', '.join(said)})" if said and DEVICE.type == "cuda" else ""


MEMORY = ("extra MB", "<=", 512)
"""Asked of everything at 131,072 tokens."""
