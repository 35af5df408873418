"""Opening a model for a prompt: what `dsa generate` and `dsa explain` share."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsa.cli import options
from dsa.cli.checks import DEFAULT
from dsa.cli.console import err, note, without_messages
from dsa.cli.waiting import Steps, roughly

if TYPE_CHECKING:
    from dsa.documents.prompt import Prompt
    from dsa.generation.session import Session
    from dsa.models import AttachReport
    from dsa.models.extension import Demand
    from dsa.models.loading import LoadedModel
    from dsa.runs.progress import Progress
    from dsa.store import ModelStore, Store

POSITIONS_WARNING = r"\d+ tokens are more than the \d+ positions"

STRETCHED_INDEXERS = "the indexers are extrapolated too"
UNTRAINED = (
    "the indexers are untrained, so what is read is arbitrary; train some with `dsa train`, or give --indexers PATH"
)
SMALL = (
    "default is a model of 135M parameters, which does not answer over more than a page; `dsa models` names larger ones"
)
PAGE = 1000
"""Tokens of a page, about."""
LONG_S = 60.0
"""A reading that takes longer is announced, with what makes it shorter."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is attached and run."""

    model: options.Model = "default"
    top_k: options.TopK = None
    local: options.Local = None
    indexers: options.Indexers = None
    threads: options.Threads = None
    device: options.Device = None
    weights: options.Weights = None
    rope_scaling: options.Extension = None
    cache: options.Cache = None
    index_dtype: options.IndexDtype = None
    kv_dtype: options.KvDtype = None


def model_or_file(given: ModelOptions, files: Sequence[Path]) -> tuple[ModelOptions, list[Path]]:
    """The model and the files to read: `dsa generate guide.pdf` names a file where a model may stand."""
    if not files and given.model != "default" and Path(given.model).is_file():
        return replace(given, model="default"), [Path(given.model)]
    return given, list(files)


def open_model(
    given: ModelOptions,
    encode: Callable[[Any], tuple[Prompt, Demand]],
    steps: Steps,
    *,
    stats: bool = False,
    store: Store | None = None,
) -> tuple[LoadedModel, AttachReport, Prompt]:
    """Loads a model with positions enough for a prompt, attaches the indexers and says what was attached.

    Args:
        given: What the user chose.
        encode: Makes the prompt, given the tokenizer, and says how much room it needs.
        steps: Shows what is being done.
        stats: Say what every layer does.
        store: Where the prompt will be kept, so that it may be larger than memory.

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
    from dsa.models.rope import scaling_of
    from dsa.models.sparse import attach_indexers

    if given.threads is not None:
        torch.set_num_threads(given.threads)
    encoded = functools.cache(encode)
    made: list[Prompt] = []

    def demand_of(tokenizer: Any) -> Demand:
        prompt, demand = encoded(tokenizer)
        made.append(prompt)
        return demand

    scaling = chosen_scaling(
        given.model,
        given.rope_scaling,
        given.indexers,
        demand_of,
        lambda demand, positions: (
            what_fits(made[-1], demand, positions) + (f". And {SMALL}" if given.model == DEFAULT else "")
        ),
    )
    loaded = load_model(
        given.model, device=given.device, status=steps.status, rope_scaling=scaling, weights=given.weights
    )
    # Choosing the scaling has said the same.
    warnings.filterwarnings("ignore", POSITIONS_WARNING, UserWarning)
    prompt, demand = encoded(loaded.tokenizer)
    overrides = options.overrides(given.top_k, given.local, given.index_dtype, given.kv_dtype)
    with without_messages(STRETCHED_INDEXERS if given.rope_scaling is None else None):
        report, _ = attach_indexers(loaded, given.indexers, cache=given.cache, **overrides)
    in_file = check_room(loaded, report.config, demand, PREFILL_CHUNK, disk=None if store is None else store.limit)
    if store is not None and in_file is not None:
        note(f"{in_file / 1e9:,.1f} GB of keys and values do not fit into memory: they will lie in {store.folder}")
    if loaded.is_default and scaling_of(loaded.model.config) is None and len(prompt.ids) > PAGE:
        # Of what is stretched the note on that has said so.
        note(SMALL)
    if stats:
        for said in (report, loaded.packed):
            if said is not None:
                err.print(str(said), markup=False, soft_wrap=True)
    elif not report.trained:
        note(UNTRAINED)
    return loaded, report, prompt


def what_fits(prompt: Prompt, demand: Demand, positions: int) -> str:
    """What of a prompt's document fits into so many positions: whole pages where it has them, else tokens."""
    from dsa.models.extension import fitting_tokens

    fitting = demand.fitting(positions)
    pages = [page for page, part in zip(prompt.pages, prompt.parts, strict=True) if part == "document"]
    whole = sorted({page for page in pages[:fitting] if page is not None} - {*pages[fitting : fitting + 1]})
    if not whole or prompt.is_joined:
        return fitting_tokens(demand, positions)
    pages_fit = "its first page fits" if len(whole) == 1 else f"its first {len(whole)} pages fit"
    return f"{pages_fit} (--pages {whole[0]}-{whole[-1]})"


def announced(
    loaded: LoadedModel, report: AttachReport, session: Session, prompt: Prompt, steps: Steps, *, ahead: bool = False
) -> Progress:
    """Says how long reading a prompt will take, where that is long, and returns what shows how far it is.

    With `ahead`, that it could be read ahead, too.
    """
    from dsa.generation.reading_time import expected_s, reading_work
    from dsa.generation.session import common_prefix

    ids = prompt.ids
    work = reading_work(loaded, report.config, len(ids))
    if work is None:
        return steps
    held = common_prefix(session.token_ids, ids)
    seconds = expected_s(loaded, work(len(ids)) - work(held))
    if seconds is not None and seconds > LONG_S:
        fewer = "--pages or --tokens" if any(prompt.pages) and not prompt.is_joined else "--tokens"
        note(
            f"reading {len(ids) - held:,} tokens takes about {roughly(seconds)} on this machine; fewer tokens "
            f"({fewer}) or a smaller --top-k take less"
            + ("; `dsa read` reads it ahead, once for all questions" if ahead else "")
        )
    return steps.growing(work, len(ids))


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Where documents are kept."""

    store: options.StoreFolder = None
    no_store: options.NoStore = False


def opened_store(given: StoreOptions) -> Store | None:
    """The store that the user chose. Raises `ValueError` for two choices, `OSError` where it is no folder."""
    from dsa.store import Store

    if given.no_store and given.store is not None:
        raise ValueError("store: got no-store too, expected one of them")
    return None if given.no_store else Store(given.store)


def model_store(store: Store | None, loaded: LoadedModel, prompt: Prompt) -> ModelStore | None:
    """The store for a model; `None` without one, and for what no later call could open.

    That is a prompt too short to be kept, and untrained indexers: they are other ones in every process.
    """
    from dsa.generation.prompt import kept_tokens
    from dsa.models.sparse import sparse_report_of
    from dsa.store import ModelStore
    from dsa.store.kept import LEAST_TOKENS

    if store is None or kept_tokens(prompt) < LEAST_TOKENS or not sparse_report_of(loaded.model).trained:
        return None
    return ModelStore(store, loaded.model, loaded.name)


def check_question(ask: str | None, prompt: str | None, files: Sequence[Path]) -> None:
    """Whether there is one, and something to ask it about.

    Raises:
        ValueError: The question is empty, there is no file, or there is a prompt, too.
    """
    from dsa.text import checked

    if ask is None:
        return
    if not checked(ask, "ask:").strip():
        raise ValueError("ask: the question is empty; give --ask TEXT, or leave it out to continue the file")
    if not files:
        raise ValueError("ask: there is no document to ask about; add --file FILE, or give the question as --prompt")
    if prompt is not None:
        raise ValueError("ask: got a prompt too, expected one of them; put all of it into --ask")
