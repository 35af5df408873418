"""Libraries of hardware makers that operations may use where they are installed: found, checked once, and measured.

Nothing here is needed to run, and nothing is installed for it. A library is trusted after it has given the right answer
to a small question of the same form on this device: releases differ in the functions they have, in the shapes they take
and in what they return. `auto` takes it where it was measured to be faster than what `auto` would take without it; the
choice is kept per device and version.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from dsa.ops.triton_support import Choices, cache_file, capability, milliseconds, tuning

Result = TypeVar("Result")


FUNCTIONS = {
    "flash_mla": ("flash_mla_sparse_fwd", "get_mla_metadata", "flash_mla_with_kvcache"),
    "deep_gemm": ("fp8_mqa_logits",),
}
"""What is called of each library."""

SERVES = {
    "flash_mla": "FlashMLA at commit ba89a346 serves, the last with kernels for DeepSeek-V3.2 on Hopper",
    "deep_gemm": "a DeepGEMM that has fp8_mqa_logits serves; its news of 2025-09-28 say that it was added",
}
"""What to install where the library at hand does not do."""


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
    except Exception as error:
        # Whatever a library does at its import (load another one, assert that one was built): it is a reason.
        said = f"{error}" or type(error).__name__
        raise RuntimeError(f"it is installed but cannot be imported: {said}") from error


def found(name: str) -> str:
    """One line about the library: what is installed, and what would serve where that does not."""
    if not installed(name):
        return f"not installed (optional; {SERVES[name]})"
    try:
        library = load(name)
    except RuntimeError as error:
        return f"{error}; {SERVES[name]}"
    missing = [function for function in FUNCTIONS[name] if not callable(getattr(library, function, None))]
    about = f"{version(name)}{_commit(name)}"
    return f"{about}, without {', '.join(missing)}; {SERVES[name]}" if missing else about


def _commit(name: str) -> str:
    """The commit that pip installed it from, where it was one."""
    try:
        origin = importlib.metadata.distribution(name.replace("_", "-")).read_text("direct_url.json")
        commit = json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        return ""
    return f" at commit {commit[:8]}" if isinstance(commit, str) else ""


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
        except Exception as error:
            _answers[name, key, device] = _refused(name, error)
    return _answers[name, key, device]


def _refused(name: str, error: Exception) -> str:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return f"{name} does not take this form here: {said[0]}. {SERVES[name]}"


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
    refused = "refused", op, shape
    if (library, refused, device) in _answers:
        return ours
    known = choices.known(key, configs)
    if known is None:
        if not tuning():
            return ours
        try:
            runs["vendor"]()
        except Exception as error:
            # It answered the small question and refuses this one: `auto` goes on without it.
            _answers[library, refused, device] = _refused(library, error)
            return ours
        known = choices.choose(key, configs, lambda config: runs[names[config["vendor"]]]())
    return names[known["vendor"]]


def close(actual: Tensor, expected: Tensor, limit: float) -> bool:
    """Whether the relative error in the norm is within the limit."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return bool(difference <= limit)
