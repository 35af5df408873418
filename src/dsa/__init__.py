"""DeepSeek Sparse Attention for any Hugging Face model.

`import dsa` costs next to nothing and changes nothing for the program that imports it: torch and transformers are
imported when something of theirs is asked for. It also sees to it that transformers' Auto classes, whenever they are
imported, find the models that `dsa` saves.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dsa import _auto_classes
from dsa.config import DSAConfig, LayerConfig

if TYPE_CHECKING:
    from dsa import ops
    from dsa.generation.document import open_document

    open = open_document
    from dsa.models import (
        AccelerateReport,
        AttachReport,
        AttentionCall,
        DSAContext,
        Family,
        PackReport,
        accelerate,
        attach,
        config_of,
        detach,
        export_deepseek_v32,
        is_accelerated,
        is_attached,
        load_indexers,
        pack_weights,
        restore,
        save_indexers,
    )

__version__ = "0.1.0"

__all__ = [
    "AccelerateReport",
    "AttachReport",
    "AttentionCall",
    "DSAConfig",
    "DSAContext",
    "Family",
    "LayerConfig",
    "PackReport",
    "accelerate",
    "attach",
    "config_of",
    "detach",
    "export_deepseek_v32",
    "is_accelerated",
    "is_attached",
    "load_indexers",
    "ops",
    "pack_weights",
    "restore",
    "save_indexers",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("dsa.ops")
    if name == "open":
        return import_module("dsa.generation.document").open_document
    if name in __all__:
        return getattr(import_module("dsa.models"), name)
    raise AttributeError(f"module 'dsa' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Not in `__all__`: `from dsa import *` would take the place of Python's own `open`.
    return sorted([*__all__, "open"])


_auto_classes.find_when_looked_up()
