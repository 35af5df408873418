"""Settings of the operations' tests, and the implementations they run on."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from dsa.ops import blocks, native_support
from dsa.testing.cases import IMPLEMENTATIONS

hypothesis.settings.register_profile("ops", max_examples=40, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ops")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `impl` runs on every implementation of what its module names in `OPERATIONS`."""
    names = set(metafunc.fixturenames)
    if "impl" in names and hasattr(metafunc.module, "OPERATIONS"):
        runs = [
            pytest.param(
                *((operation, impl) if "operation" in names else (impl,)), id=f"{operation}-{run}", marks=marks
            )
            for operation in metafunc.module.OPERATIONS
            for impl in IMPLEMENTATIONS[operation]
            for run, marks in variants(impl)
        ]
        metafunc.parametrize(("operation", "impl") if "operation" in names else "impl", runs)


def variants(impl: str) -> Iterator[tuple[str, tuple[pytest.MarkDecorator, ...]]]:
    """The runs of one implementation: of the compiled one, a run on every instruction set of this processor."""
    if impl != "native":
        yield impl, ()
    elif native_support.missing() is None:
        for isa in native_support.isas():
            yield f"native-{isa}", (pytest.mark.isa(isa),)


@pytest.fixture(autouse=True)
def chosen_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Uses the instruction set that the test is marked with."""
    marker = request.node.get_closest_marker("isa")
    if marker is None:
        yield
        return
    case = request.node.callspec.params.get("case")
    if getattr(case, "dtype", None) == torch.float64:
        pytest.skip("the CPU kernels do not compute in fp64; test_errors.py asks for the message")
    before = native_support.isa()
    native_support.set_isa(marker.args[0])
    yield
    native_support.set_isa(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are so small that a second thread only waits, for long where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every reference take one query at a time."""
    monkeypatch.setitem(blocks.BUDGET_BYTES, "cpu", 1)
