"""Triton kernels on CPU tensors: starts Triton's interpreter, which must happen before triton is first imported."""

from __future__ import annotations

import os
import sys


def start_interpreter() -> bool:
    """Makes Triton interpret kernels in this process.

    Returns:
        Whether it does: `False` where triton was imported earlier, without the interpreter.
    """
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    import triton
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        return False
    original = interpreter._patch_lang_tensor
    if original.__module__ != __name__:

        def patch_lang_tensor(tensor: type, scope: interpreter._LangPatchScope) -> None:
            # Triton 3.6 converts arrays of one element with int(), which NumPy 2.4 refuses: loops with bounds that
            # are not constants would fail.
            original(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patch_lang_tensor
    return True
