"""Libraries of hardware makers that operations may use where they are installed: found, checked once, and measured.

Nothing here is needed to run, and nothing is installed for it. A library is trusted after it has given the right answer
to a small question on this device: releases differ in the shapes they take and in what they return. `auto` takes it
where it was measured to be faster than what `auto` would take without it; the choice is kept per device and version.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from dsa.ops.triton_support import Choices, cache_file, capability, milliseconds, tuning

Result = TypeVar("Result")


@functools.cache
def installed(name: str) -> bool:
    """Whether the library can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def load(name: str) -> Any:
    """The library.

    Raises:
        RuntimeError: It is there but cannot be imported, as where it was built for another torch.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise RuntimeError(f"it is installed but cannot be imported: {error}") from error


def considered(impl: str) -> bool:
    """Whether the library is looked at: its functions are no operators that a compiled graph can hold."""
    return impl == "vendor" or (impl == "auto" and not torch.compiler.is_compiling())


def device_gap(name: str, device: torch.device) -> str | None:
    """Why the library cannot run on this device at all, or `None`."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{name} needs an NVIDIA GPU, and the tensors are on {device}"
    if not installed(name):
        return f"{name} is not installed"
    found = capability(device.index or 0)
    if found[0] not in (9, 10):
        return f"{name} needs compute capability 9.0 or 10.0, and the GPU has {found[0]}.{found[1]}"
    return None


_answers: dict[Hashable, Any] = {}


def once(name: str, key: Hashable, device: torch.device, question: Callable[[], Result]) -> Result | str:
    """What the library answers to a question that is asked once, or why it cannot be used.

    An exception of the library is such a reason: releases differ in what they take.
    """
    if (name, key, device) not in _answers:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return f"{name} is asked its first question outside of captured graphs: run this once before"
        try:
            _answers[name, key, device] = question()
        except (NotImplementedError, RuntimeError, TypeError, AttributeError, AssertionError, ValueError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            _answers[name, key, device] = f"{name} does not take this form here: {said[0]}"
    return _answers[name, key, device]


def forget() -> None:
    """Asks and looks again, as after an installation in this process."""
    _answers.clear()
    installed.cache_clear()
    load.cache_clear()


def version(name: str) -> str:
    """Its version, where it has one."""
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(load(name), "__version__", "unknown"))


@functools.cache
def _choices(index: int) -> Choices:
    name = torch.cuda.get_device_properties(index).name
    return Choices(cache_file(f"{name}-vendor-torch-{torch.__version__}"), milliseconds)


def faster(
    op: str, library: str, shape: Hashable, device: torch.device, ours: str, runs: Mapping[str, Callable[[], object]]
) -> str:
    """`"vendor"` or the name in `ours`: which was measured to be faster for this shape on this device.

    Args:
        runs: A launch by name, `"vendor"` and `ours`; each must bear being run many times.
    """
    names, configs = (ours, "vendor"), [{"vendor": 0}, {"vendor": 1}]
    key = f"{op} {ours} {library} {version(library)} {shape}"
    choices = _choices(device.index or 0)
    known = choices.known(key, configs)
    if known is None:
        if not tuning():
            return ours
        known = choices.choose(key, configs, lambda config: runs[names[config["vendor"]]]())
    return names[known["vendor"]]


def close(actual: Tensor, expected: Tensor, limit: float) -> bool:
    """Whether the relative error in the norm is within the limit."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return bool(difference <= limit)
