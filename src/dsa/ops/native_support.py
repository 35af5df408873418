"""The compiled CPU kernels: how the library is found and loaded, and how tensors are handed to it.

The library is one shared object with a plain C interface (`csrc/include/dsa`), so it depends on no version of Python
or torch. Calls go through ctypes, which releases the GIL.

Environment variables, read when the library is first used:

- `DSA_ISA`: the instruction set, in place of the best that the processor has; `dsa info` lists them.
- `DSA_THREADS_FROM`: `torch` (the default) runs kernels on torch's OpenMP threads, `own` on threads of the library
  that sleep between calls. Forked children and processes without an OpenMP runtime use `own`.
- `DSA_NATIVE_LIBRARY`: another library file.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI_VERSION = 2
"""`DSA_ABI_VERSION` of `csrc/include/dsa/runtime.h`."""

DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.int32: 4,
    torch.float8_e4m3fn: 5,
}
"""`dsa_dtype` of `csrc/include/dsa/tensor.h`."""

HOW_TO_BUILD = "install a C++ compiler (g++ or clang) and install dsa-attention again"

_FILE_NAMES = {"darwin": "libdsa_native.dylib", "win32": "dsa_native.dll"}
_OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")

_PACK = [struct.Struct(f"=Q{dims}q{8 * (4 - dims)}x{dims}q{8 * (4 - dims)}x2i").pack for dims in range(5)]
"""By number of dims, the bytes of a `dsa_tensor`: where it lies, its sizes, its strides in elements, dtype and dims."""

_ABSENT = _PACK[0](0, 0, 0)


def pack(*tensors: Tensor | None) -> bytes:
    """The beginning of an operation's argument structure: a `dsa_tensor` for each tensor, of at most four dims.

    `None` is an absent argument. The caller keeps the tensors alive until the kernel has returned. Bytes take a third
    of the time of nested ctypes structures, and a decoding step describes some twenty tensors a layer.
    """
    parts = []
    for tensor in tensors:
        if tensor is None:
            parts.append(_ABSENT)
        else:
            dims = tensor.ndim
            parts.append(_PACK[dims](tensor.data_ptr(), *tensor.shape, *tensor.stride(), DTYPES[tensor.dtype], dims))
    return b"".join(parts)


class Unavailable(Exception):
    """The library is not there, or cannot be used; the message says why and what helps."""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, running on the instruction set that `DSA_ISA` names, or the processor's best.

    Raises:
        Unavailable: There is none that can be used.
        OSError: There is one, and the system cannot load it.
        ValueError: An environment variable has a value that it cannot have.
    """
    loaded = ctypes.CDLL(str(_find()))
    loaded.dsa_abi_version.restype = ctypes.c_int32
    version = loaded.dsa_abi_version()
    if version != ABI_VERSION:
        raise Unavailable(
            f"the kernel library has interface version {version} and this dsa needs {ABI_VERSION}: "
            "it was built from other sources; install dsa-attention again"
        )
    for name in ("dsa_isa", "dsa_isas"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.dsa_set_isa.argtypes = (ctypes.c_char_p,)
    loaded.dsa_set_openmp.argtypes = (ctypes.c_void_p,)
    loaded.dsa_set_openmp.restype = None
    wanted = os.environ.get("DSA_ISA")
    if wanted and loaded.dsa_set_isa(wanted.encode()) != 0:
        raise ValueError(
            f"DSA_ISA={wanted} is not an instruction set of this machine; use one of "
            f"{loaded.dsa_isas().decode().replace(',', ', ')}, or unset it for the best"
        )
    threads_from = os.environ.get("DSA_THREADS_FROM") or "torch"
    if threads_from not in ("torch", "own"):
        raise ValueError(f"DSA_THREADS_FROM must be torch or own, got {threads_from}")
    if threads_from == "torch":
        loaded.dsa_set_openmp(_openmp_of_torch())
    return loaded


@functools.cache
def missing() -> str | None:
    """Why there is no library, or `None`; said as a warning the first time that someone would have used it."""
    try:
        library()
    except Unavailable as error:
        reason = str(error)
    except OSError as error:
        reason = f"the kernel library cannot be loaded ({error})"
    else:
        return None
    warnings.warn(
        f"dsa runs without its CPU kernels, several times slower: {reason}. To have them, {HOW_TO_BUILD}.", stacklevel=2
    )
    return reason


def gap(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, or `None` where they can.

    Args:
        tensors: The floating-point arguments of an operation; `None` for absent ones.

    Returns:
        The reason, worded for `resolve_impl`.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cpu:
            return f"the kernels run on the CPU, and the tensors are on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"{tensor.dtype} has no CPU kernel"
    return _constant_missing()


def _constant_missing() -> str | None:
    """`missing()`, which torch.compile need not look into."""
    return missing()


# What torch.compiler.assume_constant_result does, which would import the whole compiler first.
_constant_missing.__dict__["_dynamo_marked_constant"] = True


def isas() -> tuple[str, ...]:
    """The instruction sets that the kernels can use here, best first."""
    return tuple(library().dsa_isas().decode().split(","))


def isa() -> str:
    """The instruction set in use."""
    return library().dsa_isa().decode()


def set_isa(name: str) -> None:
    """Uses another of `isas()` from now on, in the whole process.

    Raises:
        ValueError: It is none of them.
    """
    if library().dsa_set_isa(name.encode()) != 0:
        raise ValueError(f"{name!r} is none of this machine's instruction sets, {', '.join(isas())}")


class OutOfRange(Exception):
    """A kernel met a position outside the keys, and read nothing through it; the caller words it for the user."""


def call(name: str, arguments: bytes) -> None:
    """Runs `dsa_<name>` on its argument structure, as `pack` and `struct` make it.

    Raises:
        MemoryError: The kernel could not get its scratch memory.
        OutOfRange: From the operations that check positions themselves.
    """
    status = _operation(name)(arguments)
    if status == 2:
        raise OutOfRange(name)
    if status != 0:
        raise MemoryError(f"{name}: not enough memory for the kernel's scratch buffers")


@functools.cache
def _operation(name: str) -> Callable[[bytes], int]:
    function = getattr(library(), f"dsa_{name}")
    function.argtypes = (ctypes.c_char_p,)
    return function


def graph_operation(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function one node of the graphs that torch.compile makes, which could not look into a call of a kernel.

    Only while compiling is it called through torch's dispatcher, which costs 7 us a call.

    Args:
        schema: Name and arguments as `torch.library` writes them; nothing that is passed is written to.
    """
    name, arguments = schema.split("(", 1)
    return torch.library.custom_op(f"dsa::{name}_native", mutates_args=(), device_types="cpu", schema=f"({arguments}")


def threads() -> int:
    """How many threads a kernel may use: torch's number."""
    return torch.get_num_threads()


def _find() -> Path:
    """The library next to the package, wherever an (editable) installation has put it."""
    chosen = os.environ.get("DSA_NATIVE_LIBRARY")
    if chosen:
        if not Path(chosen).is_file():
            raise ValueError(
                f"DSA_NATIVE_LIBRARY={chosen} is not a file; unset it for the library of this installation"
            )
        return Path(chosen)
    name = _FILE_NAMES.get(sys.platform, "libdsa_native.so")
    for folder in sys.modules["dsa"].__path__:
        path = Path(folder) / "_native" / name
        if path.exists():
            return path
    raise Unavailable("this installation was made without a C++ compiler")


def _openmp_of_torch() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch has loaded, so that one pool serves both."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    runtimes = [path for path in sorted(paths) if Path(path).name.startswith(_OPENMP_NAMES)]
    # Of several, the one that came with torch.
    runtimes.sort(key=lambda path: not path.startswith(str(Path(torch.__file__).parent)))
    for path in runtimes:
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
