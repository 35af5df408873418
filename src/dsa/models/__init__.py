"""Sparse attention on Hugging Face models: attach, detach, indexer checkpoints, saving and loading.

Names are looked up lazily: transformers asks `dsa.models.saving` for a configuration class, and for that no model code
is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsa.models.acceleration import AccelerateReport, accelerate, is_accelerated, restore
    from dsa.models.attached import AttachReport, LayerReport, config_of, indexers_of, is_attached, report_of
    from dsa.models.attachment import attach, detach
    from dsa.models.checkpoint import load_indexers, save_indexers
    from dsa.models.context import AttentionCall, DSAContext
    from dsa.models.families import Family
    from dsa.models.latent.export import export_deepseek_v32
    from dsa.models.packing import PackReport, pack_weights

_HOMES = {
    "AccelerateReport": "acceleration",
    "AttachReport": "attached",
    "AttentionCall": "context",
    "DSAContext": "context",
    "Family": "families",
    "LayerReport": "attached",
    "PackReport": "packing",
    "accelerate": "acceleration",
    "attach": "attachment",
    "config_of": "attached",
    "detach": "attachment",
    "export_deepseek_v32": "latent.export",
    "indexers_of": "attached",
    "is_accelerated": "acceleration",
    "is_attached": "attached",
    "load_indexers": "checkpoint",
    "pack_weights": "packing",
    "report_of": "attached",
    "restore": "acceleration",
    "save_indexers": "checkpoint",
}

__all__ = [
    "AccelerateReport",
    "AttachReport",
    "AttentionCall",
    "DSAContext",
    "Family",
    "LayerReport",
    "PackReport",
    "accelerate",
    "attach",
    "config_of",
    "detach",
    "export_deepseek_v32",
    "indexers_of",
    "is_accelerated",
    "is_attached",
    "load_indexers",
    "pack_weights",
    "report_of",
    "restore",
    "save_indexers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dsa.models' has no attribute {name!r}")
    return getattr(import_module(f"dsa.models.{_HOMES[name]}"), name)
