"""An OpenAI-compatible server of one model, over documents that stay read.

    from dsa.serve import create_app

One process, one model, one inference thread (`engine.py`); everything else is HTTP.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsa.serve.app import create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    # What needs FastAPI is imported when it is asked for.
    if name in __all__:
        return getattr(import_module("dsa.serve.app"), name)
    raise AttributeError(f"module 'dsa.serve' has no attribute {name!r}")
