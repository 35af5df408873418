"""Opening a model for a prompt: what `dsa generate` and `dsa explain` share."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dsa.cli import options
from dsa.cli.console import err
from dsa.cli.waiting import Steps

if TYPE_CHECKING:
    from dsa.models import AttachReport
    from dsa.models.extension import Demand
    from dsa.models.loading import LoadedModel

POSITIONS_WARNING = r"\d+ tokens are more than the \d+ positions"

Encoded = TypeVar("Encoded")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is attached and run."""

    model: options.Model
    top_k: options.TopK = None
    local: options.Local = None
    indexers: options.Indexers = None
    threads: options.Threads = None
    device: options.Device = None
    rope_scaling: options.Extension = None


def open_model(
    given: ModelOptions,
    encode: Callable[[Any], tuple[Encoded, Demand]],
    steps: Steps,
    *,
    cache: str | None = None,
    index_dtype: str | None = None,
) -> tuple[LoadedModel, AttachReport, Encoded]:
    """Loads a model with positions enough for a prompt, attaches the indexers and says what was attached.

    Args:
        given: What the user chose.
        encode: Makes the prompt, given the tokenizer, and says how much room it needs.
        steps: Shows what is being done.
        cache: As in `dsa.accelerate`.
        index_dtype: How index keys are stored.

    Returns:
        The model, what attaching did, and the prompt.

    Raises:
        ValueError: The model cannot be attached, or the prompt does not fit into its positions or into memory.
        OSError: The model or the indexers cannot be read.
    """
    import torch

    from dsa.generation.room import check_room
    from dsa.generation.session import PREFILL_CHUNK
    from dsa.models.extension import chosen_scaling
    from dsa.models.loading import load_model
    from dsa.models.sparse import attach_indexers

    if given.threads is not None:
        torch.set_num_threads(given.threads)
    encoded = functools.cache(encode)
    scaling = chosen_scaling(given.model, given.rope_scaling, given.indexers, lambda tokenizer: encoded(tokenizer)[1])
    loaded = load_model(given.model, device=given.device, status=steps.status, rope_scaling=scaling)
    # Choosing the scaling has said the same.
    warnings.filterwarnings("ignore", POSITIONS_WARNING, UserWarning)
    prompt, demand = encoded(loaded.tokenizer)
    overrides = options.overrides(given.top_k, given.local, index_dtype)
    report, _ = attach_indexers(loaded, given.indexers, cache=cache, **overrides)
    check_room(loaded, report.config, demand, PREFILL_CHUNK)
    err.print(str(report), markup=False, soft_wrap=True)
    return loaded, report, prompt


def check_question(ask: str | None, prompt: str | None, file: Path | None) -> None:
    """Whether there is one, and something to ask it about.

    Raises:
        ValueError: The question is empty, there is no file, or a prompt besides.
    """
    from dsa.text import checked

    if ask is None:
        return
    if not checked(ask, "ask:").strip():
        raise ValueError("ask: the question is empty; give --ask TEXT, or leave it out to continue the file")
    if file is None:
        raise ValueError("ask: there is no document to ask about; add --file FILE, or give the question as --prompt")
    if prompt is not None:
        raise ValueError("ask: got a prompt too, expected one of them; put all of it into --ask")
