"""Training of indexers, and of models to live with them; resumable to the last bit.

Nothing is imported until it is asked for, so that the help of `dsa train` can read the settings without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsa.train.data import TokenStream, Window, Windows, read_data, write_tokens
    from dsa.train.dense import train_dense
    from dsa.train.holdout import Holdout
    from dsa.train.loop import NotFiniteError, TrainingResult
    from dsa.train.options import RunOptions
    from dsa.train.processes import Processes, start_processes
    from dsa.train.progress import HoldoutRecord, LineReporter, LiveReporter, Reporter, Reporters, StepRecord
    from dsa.train.settings import DenseSettings, SparseSettings, WarmupSettings
    from dsa.train.sparse import train_sparse
    from dsa.train.warmup import train_indexers

MODULES = {
    "data": ("TokenStream", "Window", "Windows", "read_data", "write_tokens"),
    "dense": ("train_dense",),
    "holdout": ("Holdout",),
    "loop": ("NotFiniteError", "TrainingResult"),
    "options": ("RunOptions",),
    "processes": ("Processes", "start_processes"),
    "progress": ("HoldoutRecord", "LineReporter", "LiveReporter", "Reporter", "Reporters", "StepRecord"),
    "settings": ("DenseSettings", "SparseSettings", "WarmupSettings"),
    "sparse": ("train_sparse",),
    "warmup": ("train_indexers",),
}

__all__ = [
    "DenseSettings",
    "Holdout",
    "HoldoutRecord",
    "LineReporter",
    "LiveReporter",
    "NotFiniteError",
    "Processes",
    "Reporter",
    "Reporters",
    "RunOptions",
    "SparseSettings",
    "StepRecord",
    "TokenStream",
    "TrainingResult",
    "WarmupSettings",
    "Window",
    "Windows",
    "read_data",
    "start_processes",
    "train_dense",
    "train_indexers",
    "train_sparse",
    "write_tokens",
]


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(import_module(f"dsa.train.{module}"), name)
    raise AttributeError(f"module 'dsa.train' has no attribute {name!r}")
