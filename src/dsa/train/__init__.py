"""Training of indexers: dense warm-up on a frozen model, resumable to the last bit."""

from dsa.train.data import TokenStream, read_data, write_tokens
from dsa.train.progress import LineReporter, LiveReporter, Reporter, StepRecord
from dsa.train.settings import WarmupSettings
from dsa.train.warmup import NotFiniteError, WarmupResult, train_indexers

__all__ = [
    "LineReporter",
    "LiveReporter",
    "NotFiniteError",
    "Reporter",
    "StepRecord",
    "TokenStream",
    "WarmupResult",
    "WarmupSettings",
    "read_data",
    "train_indexers",
    "write_tokens",
]
