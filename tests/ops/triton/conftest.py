"""Runs the Triton kernels: on a GPU where there is one, else on CPU tensors under Triton's interpreter.

The interpreter must be chosen before triton is first imported, so these tests want a process of their own:
`pytest tests/ops/triton`. In a process where triton came first they fail with that advice.
"""

import pytest
import torch

from dsa.testing.triton_interpreter import start_interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
READY = DEVICE == "cuda" or start_interpreter()


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    if not READY:
        pytest.fail("triton was imported before the interpreter could start; run pytest tests/ops/triton by itself")


@pytest.fixture
def device() -> str:
    return DEVICE
