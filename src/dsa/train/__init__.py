"""Training of indexers, and of models to live with them; resumable to the last bit."""

from dsa.train.data import TokenStream, Window, Windows, read_data, write_tokens
from dsa.train.dense import train_dense
from dsa.train.holdout import Holdout
from dsa.train.loop import NotFiniteError, TrainingResult
from dsa.train.processes import Processes, start_processes
from dsa.train.progress import HoldoutRecord, LineReporter, LiveReporter, Reporter, Reporters, StepRecord
from dsa.train.settings import DenseSettings, SparseSettings, WarmupSettings
from dsa.train.sparse import train_sparse
from dsa.train.warmup import train_indexers

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
