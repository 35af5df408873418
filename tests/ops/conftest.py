"""Settings of the operations' tests, and the implementations they run on."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from dsa.ops import blocks
from dsa.testing.cases import IMPLEMENTATIONS

hypothesis.settings.register_profile("ops", max_examples=40, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ops")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `impl` runs on every implementation of what its module names in `OPERATIONS`."""
    names = set(metafunc.fixturenames)
    if "impl" in names and hasattr(metafunc.module, "OPERATIONS"):
        runs = [(operation, impl) for operation in metafunc.module.OPERATIONS for impl in IMPLEMENTATIONS[operation]]
        if "operation" in names:
            metafunc.parametrize(("operation", "impl"), runs)
        else:
            metafunc.parametrize("impl", [impl for _, impl in runs])


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
