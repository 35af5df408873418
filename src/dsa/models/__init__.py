"""Sparse attention on Hugging Face models: attach, detach, indexer checkpoints, saving and loading.

Names are looked up lazily: registering the configuration classes (`dsa.models.saving`) happens in the middle of
importing transformers, when most of it cannot be imported yet.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsa.models.attachment import (
        AttachReport,
        LayerReport,
        attach,
        config_of,
        detach,
        indexers_of,
        is_attached,
        report_of,
    )
    from dsa.models.checkpoint import load_indexers, save_indexers
    from dsa.models.context import AttentionCall, DSAContext
    from dsa.models.native.acceleration import AccelerateReport, accelerate, is_accelerated, restore
    from dsa.models.native.export import export_deepseek_v32

_HOMES = {
    "AccelerateReport": "native.acceleration",
    "AttachReport": "attachment",
    "AttentionCall": "context",
    "DSAContext": "context",
    "LayerReport": "attachment",
    "accelerate": "native.acceleration",
    "attach": "attachment",
    "config_of": "attachment",
    "detach": "attachment",
    "export_deepseek_v32": "native.export",
    "indexers_of": "attachment",
    "is_accelerated": "native.acceleration",
    "is_attached": "attachment",
    "load_indexers": "checkpoint",
    "report_of": "attachment",
    "restore": "native.acceleration",
    "save_indexers": "checkpoint",
}

__all__ = [
    "AccelerateReport",
    "AttachReport",
    "AttentionCall",
    "DSAContext",
    "LayerReport",
    "accelerate",
    "attach",
    "config_of",
    "detach",
    "export_deepseek_v32",
    "indexers_of",
    "is_accelerated",
    "is_attached",
    "load_indexers",
    "report_of",
    "restore",
    "save_indexers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dsa.models' has no attribute {name!r}")
    return getattr(import_module(f"dsa.models.{_HOMES[name]}"), name)
