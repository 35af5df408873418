"""Random choices, and tensors that lie in memory in any way that a caller's may."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dsa.ops import native_support
from dsa.ops.types import Impl

Choice = TypeVar("Choice")

FLOATS = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16)


class Difference(AssertionError):
    """A result that the oracle does not allow."""


class Draws:
    """The random choices of one case, a function of its seed.

    Args:
        seed: Number of the case.
        small: Only few tokens and keys, for implementations that are slow.
        implementations: Names that the case may be run with.
    """

    def __init__(self, seed: int, *, small: bool = False, implementations: Sequence[Impl] = ("native", "reference")):
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.small = small
        self.implementations = implementations
        # The Triton kernels round probabilities to the dtype of 16-bit inputs, which the oracles do not allow for.
        self.floats = (torch.float32,) if small else FLOATS
        self.notes: dict[str, Any] = {}

    def note(self, **values: Any) -> None:
        """Keeps what was drawn, for the report of a case that fails."""
        self.notes.update(values)

    def chance(self, share: float) -> bool:
        """True in this share of the cases."""
        return self.random.random() < share

    def pick(self, options: Sequence[Choice]) -> Choice:
        """One of them."""
        return self.random.choice(options)

    def whole(self, low: int, high: int) -> int:
        """A whole number in `[low, high]`."""
        return self.random.randint(low, high)

    def size(self, *highest: int) -> int:
        """A size: up to one of these, the later ones less often."""
        limit = highest[0]
        for larger in highest[1:]:
            if self.small or self.chance(0.6):
                break
            limit = larger
        return self.whole(1, limit)

    def normal(self, sizes: Sequence[int], size: float = 1.0) -> np.ndarray:
        """Normally distributed numbers, some of them zeros or whole in some cases."""
        values = self.numbers.standard_normal(sizes)
        kind = self.pick(("plain", "plain", "plain", "whole", "sparse", "wide", "equal"))
        if kind == "whole":
            values = values.round()
        elif kind == "sparse":
            values = values * (self.numbers.random(sizes) < 0.3)
        elif kind == "wide":
            values = values * 10.0 ** self.numbers.uniform(-6, 0, sizes)
        elif kind == "equal":
            values = np.full(sizes, self.numbers.standard_normal())
        return values * size

    def lay_out(self, values: np.ndarray | Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of these values: dims in any order in memory, with gaps that hold NaN, at any offset."""
        tensor = (values.clone() if isinstance(values, Tensor) else torch.as_tensor(np.array(values))).to(dtype)
        if self.chance(0.4) or not tensor.numel():
            return tensor.contiguous()
        order = list(range(tensor.ndim))
        if self.chance(0.6):
            self.random.shuffle(order)
        steps = [self.pick((1, 1, 1, 2)) for _ in order]
        extra = [self.pick((0, 0, 1, 3)) for _ in order]
        sizes = [tensor.shape[dim] * steps[dim] + extra[dim] for dim in order]
        offset = self.pick((0, 0, 1, 3, 16))
        buffer = torch.empty(offset + int(np.prod(sizes)), dtype=dtype)
        buffer.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max)
        stored = buffer[offset:].view(sizes)
        view = stored.permute([order.index(dim) for dim in range(tensor.ndim)])
        view = view[tuple(slice(0, tensor.shape[dim] * steps[dim], steps[dim]) for dim in range(tensor.ndim))]
        view.copy_(tensor)
        return view

    def ranges(self, batch: int, tokens: int, keys: int) -> tuple[Tensor | None, Tensor | None]:
        """`key_start, key_end`, either of them absent in some cases; empty and reversed ranges too."""
        kind = self.pick(("default", "default", "random", "window", "lengths", "nothing", "one"))
        end = self.numbers.integers(0, keys + 1, (batch, tokens))
        start = self.numbers.integers(0, keys + 1, (batch, tokens))
        if kind == "default":
            return None, None
        if kind == "window":
            start = np.maximum(end - self.whole(0, 20), 0)
        elif kind == "lengths":
            start = np.broadcast_to(self.numbers.integers(0, keys + 1, (batch, 1)), (batch, tokens))
            end = np.full((batch, tokens), keys)
        elif kind == "nothing":
            start, end = np.full((batch, tokens), keys), np.zeros((batch, tokens), np.int64)
        elif kind == "one":
            start = np.maximum(end - 1, 0)
        if self.chance(0.2):
            start = np.where(self.numbers.random((batch, tokens)) < 0.3, end, start)
        dtype = self.pick((torch.int32, torch.int64))
        given_start, given_end = (self.lay_out(np.ascontiguousarray(edge), dtype) for edge in (start, end))
        # A start without an end may lie after the causal end, which sees nothing.
        return self.pick(((given_start, given_end), (given_start, given_end), (None, given_end), (given_start, None)))

    def implementation(self) -> Impl:
        """The implementation to run, on an instruction set and with a number of threads that are set here."""
        impl = self.pick(self.implementations)
        threads = self.pick((1, 1, 2, 3))
        torch.set_num_threads(threads)
        self.note(impl=impl, threads=threads)
        if impl == "native":
            isa = self.pick(native_support.isas())
            native_support.set_isa(isa)
            self.note(isa=isa)
        return impl


@dataclass
class Bounded:
    """Exact results and how far each may be off: both fp64, of one shape."""

    exact: np.ndarray
    error: np.ndarray

    @classmethod
    def zeros(cls, sizes: Sequence[int]) -> Bounded:
        return cls(np.zeros(sizes), np.zeros(sizes))


def numbers(tensor: Tensor) -> np.ndarray:
    """The values of a tensor in fp64."""
    return tensor.detach().double().numpy()


def smallest(dtype: torch.dtype) -> float:
    """The distance of subnormal numbers."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def compare(what: str, actual: Tensor, expected: Bounded) -> None:
    """Checks each number against its bound, widened by one rounding to the dtype of the result.

    Where the exact result is not finite the actual one must not be either. Where it comes so near to the largest number
    of the dtype that rounding may pass it, everything is allowed.

    Raises:
        Difference: A number outside its bound.
    """
    info = torch.finfo(actual.dtype)
    if actual.shape != torch.Size(expected.exact.shape):
        raise Difference(f"{what}: shape {list(actual.shape)}, expected {list(expected.exact.shape)}")
    with np.errstate(invalid="ignore", over="ignore"):
        got, exact = numbers(actual), expected.exact
        allowed = expected.error + 2 * info.eps * (np.abs(exact) + expected.error) + 4 * smallest(actual.dtype)
        finite = np.isfinite(exact)
        near_overflow = np.abs(exact) + allowed >= 0.3 * info.max
        off = ~(np.abs(got - exact) <= allowed) & (got != exact) & ~near_overflow
        wrong = np.where(finite, off, np.isfinite(got))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise Difference(
            f"{what}{list(place)}: got {got[place]:.9g}, expected {exact[place]:.9g} within {allowed[place]:.3g} "
            f"({int(wrong.sum())} of {wrong.size} differ)"
        )
