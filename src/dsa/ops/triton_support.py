"""What the Triton implementations share that needs no triton to import: where they can run, and which sizes they use.

Kernels have few free sizes (rows of a tile, stages of the load pipeline, warps). Each kernel states a short list of
candidates; the first that fits the device's shared memory is used, or the fastest one where tuning is on.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

LOWEST_CAPABILITY = (8, 0)

CHECKED_ON_A_GPU = False
"""Whether `python -m benchmarks.gpu` has passed on a GPU. Until then `auto` does not take them."""

SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}
"""KiB that one block may use, by compute capability (CUDA C++ programming guide); 99 is the least of all."""

Result = TypeVar("Result")

Config = dict[str, int]
"""Constants of a kernel and its `num_warps` and `num_stages`."""


_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors (`TRITON_INTERPRET=1` when triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def capability(index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    # Not through a cache and not through get_device_capability: torch.compile folds this call alone into a constant.
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.minor


def processors(index: int) -> int:
    """Number of multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def gap(*tensors: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take these tensors, or `None` where they can.

    Returns:
        The reason, worded for `resolve_impl`.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    device = present[0].device
    if not _INSTALLED:
        return "triton is not installed (pip install 'triton>=3.6', Linux x86-64 only)"
    if device.type == "cpu":
        if not interpreted():
            return "the kernels need an NVIDIA GPU, or CPU tensors with TRITON_INTERPRET=1 set at start"
    elif device.type != "cuda":
        return f"the kernels need an NVIDIA GPU, and the tensors are on {device}"
    elif torch.version.hip is not None:
        return "the kernels were written for NVIDIA GPUs"
    elif capability(device.index or 0) < LOWEST_CAPABILITY:
        major, minor = capability(device.index or 0)
        return f"the GPU has compute capability {major}.{minor} and the kernels need 8.0"
    for tensor in present:
        if tensor.dtype == torch.float64:
            return "fp64 has no Triton kernel"
    return None


def by_default() -> bool:
    """Whether `auto` takes the kernels on a GPU: once they were checked on one, or with `DSA_TRITON=1`."""
    return os.environ.get("DSA_TRITON", "1" if CHECKED_ON_A_GPU else "0") == "1"


def with_triton(others: Mapping[str, str | None], *tensors: Tensor | None) -> dict[str, str | None]:
    """The gaps of an operation's implementations, with Triton's first where `auto` takes it and last elsewhere.

    Args:
        others: Gaps of the other implementations, fastest first; see `resolve_impl`.
        tensors: The floating-point arguments.
    """
    reason = gap(*tensors)
    on_gpu = any(tensor is not None and tensor.device.type == "cuda" for tensor in tensors)
    return {"triton": reason, **others} if on_gpu and by_default() else {**others, "triton": reason}


def checks_indices() -> bool:
    """Whether the kernels' callers look for indices out of range, which waits for the device: a debugging aid."""
    return os.environ.get("DSA_CHECK_INDICES", "0") not in ("", "0")


def has_fp8(device: torch.device) -> bool:
    """Whether the device converts and multiplies e4m3 numbers by itself; elsewhere kernels decode their bytes."""
    return device.type == "cuda" and capability(device.index or 0) >= (8, 9)


def on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device; this makes it that of the tensors (and is nothing on a CPU)."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use; unlimited under the interpreter."""
    if device.type != "cuda":
        return 1 << 62
    return SHARED_MEMORY.get(capability(device.index or 0), 99) << 10


def fitting(configs: Sequence[Config], bytes_of: Callable[[Config], int], device: torch.device) -> list[Config]:
    """The candidates whose tiles fit the device's shared memory; the smallest one if none does."""
    limit = shared_memory(device)
    return [config for config in configs if bytes_of(config) <= limit] or [min(configs, key=bytes_of)]


def tuning() -> bool:
    """Whether candidates are timed: on unless `DSA_AUTOTUNE=0`, and never while a graph is captured."""
    return os.environ.get("DSA_AUTOTUNE", "1") != "0" and not torch.cuda.is_current_stream_capturing()


def cache_file(device_name: str) -> Path:
    """Where the choices for a device are kept: below `$DSA_CACHE`, else the user's cache directory."""
    root = os.environ.get("DSA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsa"
    name = "".join(letter if letter.isalnum() else "-" for letter in device_name.lower())
    return Path(root) / "triton" / f"{name}.json"


class Choices:
    """The configurations chosen on one device, read from and written to its cache file.

    Args:
        file: JSON: by key the position in the list of candidates and the list itself, which must still match.
        time: Milliseconds that a launch takes.
    """

    def __init__(self, file: Path, time: Callable[[Callable[[], object]], float]) -> None:
        self._file = file
        self._time = time
        self._chosen: dict[str, Config] = {}
        try:
            self._stored = json.loads(file.read_text())
        except (OSError, ValueError):
            # A missing or broken cache costs time, not correctness.
            self._stored = {}

    def known(self, key: str, configs: Sequence[Config]) -> Config | None:
        """What was chosen for `key` before, here or in an earlier process."""
        if key not in self._chosen:
            stored = self._stored.get(key)
            if stored is None or stored["candidates"] != list(configs):
                return None
            self._chosen[key] = configs[stored["best"]]
        return self._chosen[key]

    def choose(self, key: str, configs: Sequence[Config], launch: Callable[[Config], object]) -> Config:
        """The fastest of `configs` for `key`, timed at most once per device and list of candidates."""
        known = self.known(key, configs)
        if known is not None:
            return known
        best = self._fastest(configs, launch)
        self._stored[key] = {"candidates": list(configs), "best": best}
        self._chosen[key] = configs[best]
        self._save()
        return configs[best]

    def _fastest(self, configs: Sequence[Config], launch: Callable[[Config], object]) -> int:
        from triton.runtime.errors import OutOfResources

        times = []
        for config in configs:
            try:
                times.append(self._time(functools.partial(launch, config)))
            except OutOfResources:
                times.append(float("inf"))
        return min(range(len(times)), key=times.__getitem__)

    def _save(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(self._stored, indent=1))
            part.replace(self._file)
        except OSError:
            # A cache that cannot be written is the same as none: the next process measures again.
            return


def milliseconds(launch: Callable[[], object], repeats: int = 10) -> float:
    """Median time of a launch between device events, after two launches that compile and warm up."""
    for _ in range(2):
        launch()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


@functools.cache
def _choices(index: int) -> Choices:
    import triton

    properties = torch.cuda.get_device_properties(index)
    return Choices(cache_file(f"{properties.name}-triton-{triton.__version__}"), milliseconds)


def choose(
    kernel: str, shape: Hashable, configs: Sequence[Config], device: torch.device, launch: Callable[[Config], object]
) -> Config:
    """The configuration to launch with.

    Args:
        kernel: Name of the kernel.
        shape: What the choice depends on, apart from the device.
        configs: Candidates, best guess first; see `fitting`.
        device: Where the tensors are.
        launch: Runs the kernel with a candidate; it must bear being run many times.
    """
    if len(configs) == 1 or device.type != "cuda":
        return configs[0]
    with torch.cuda.device(device):
        choices, key = _choices(device.index or 0), f"{kernel} {shape}"
        if tuning():
            return choices.choose(key, configs, launch)
        return choices.known(key, configs) or configs[0]


def launch_chosen(
    kernel: str, shape: Hashable, configs: Sequence[Config], device: torch.device, launch: Callable[[Config], Result]
) -> Result:
    """Runs the chosen configuration; where the device turns out too small for it, the next candidate that fits.

    The estimates that `fitting` uses cannot know every layout a compiler picks. Arguments as for `choose`.

    Raises:
        NotImplementedError: No candidate fits.
    """
    from triton.runtime.errors import OutOfResources

    chosen = choose(kernel, shape, configs, device, launch)
    for config in (chosen, *(config for config in configs if config != chosen)):
        try:
            return launch(config)
        except OutOfResources as error:
            reason = error
    raise NotImplementedError(
        f"{kernel}: no tile fits this GPU for the shape {shape} ({reason}); use 16-bit inputs or impl='reference'"
    )
