"""Settings of the operations' tests, and the implementations they run on."""

import hypothesis
import pytest

from dsa.ops import blocks
from dsa.testing.cases import IMPLEMENTATIONS

hypothesis.settings.register_profile("ops", max_examples=40, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ops")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `impl` runs on every implementation of what its module names in `OPERATIONS`."""
    names = set(metafunc.fixturenames)
    if "impl" in names:
        runs = [(operation, impl) for operation in metafunc.module.OPERATIONS for impl in IMPLEMENTATIONS[operation]]
        if "operation" in names:
            metafunc.parametrize(("operation", "impl"), runs)
        else:
            metafunc.parametrize("impl", [impl for _, impl in runs])


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every reference take one query at a time."""
    monkeypatch.setitem(blocks.BUDGET_BYTES, "cpu", 1)
