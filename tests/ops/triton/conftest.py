"""Runs the Triton kernels: on a GPU where there is one, else on CPU tensors under Triton's interpreter.

The interpreter must be chosen before triton is first imported, so these tests want a process of their own:
`pytest tests/ops/triton`. In a process where triton came first they fail with that advice.
"""

import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import triton  # noqa: E402

if DEVICE == "cpu":
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor_for_numpy(tensor: type, scope: object) -> None:
        # Triton 3.6 converts arrays of one element with int(), which NumPy 2.4 refuses: loops with bounds that are
        # not constants would fail.
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor_for_numpy


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
        pytest.fail("triton was imported before TRITON_INTERPRET was set; run pytest tests/ops/triton by itself")


@pytest.fixture
def device() -> str:
    return DEVICE
