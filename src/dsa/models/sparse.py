"""Models that run sparse, whether they are attached or were born with DSA and are accelerated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dsa.models.acceleration import accelerate, accelerate_report_of, accelerated, cache_of, is_accelerated, restore
from dsa.models.attached import AttachReport, is_attached, report_of
from dsa.models.attachment import attach, detach, put_on, take_off
from dsa.models.default_model import DEFAULT_MODEL
from dsa.models.families import born_with_dsa
from dsa.models.loading import LoadedModel


def is_sparse(model: nn.Module) -> bool:
    """Whether this model is attached or accelerated."""
    return is_attached(model) or is_accelerated(model)


def sparse_report_of(model: PreTrainedModel) -> AttachReport:
    """What `attach` or `accelerate` returned for this model. Raises `ValueError` where neither was called."""
    return accelerate_report_of(model) if is_accelerated(model) else report_of(model)


def attach_indexers(
    loaded: LoadedModel, indexers: str | Path | None = None, *, cache: str | None = None, **overrides: Any
) -> tuple[AttachReport, str | None]:
    """Attaches a loaded model; without `indexers`, with those that belong to it.

    Models born with DSA are accelerated with their own.

    Args:
        loaded: The model. One that is attached already keeps its own indexers, unless others are named.
        indexers: As in `dsa.attach`. `None` takes the model's own, those shipped with the default model, or
            untrained ones.
        cache: As in `dsa.accelerate`; `None` keeps what an accelerated model has, or `"full"`.
        **overrides: Fields of the configuration to change, `top_k=512` for example.

    Returns:
        What attaching did, and where the indexers came from: `None` for untrained ones.

    Raises:
        ValueError: `dsa.attach` refuses the model, the indexers or the configuration.
        OSError: The indexers cannot be read.
    """
    model = loaded.model
    if born_with_dsa(model.config):
        _refuse_other_indexers(loaded, indexers)
        if is_accelerated(model):
            if cache is None and not overrides:
                return accelerate_report_of(model), loaded.name
            cache = cache or cache_of(model)
            restore(model)
        return accelerate(model, cache=cache or "full", **overrides), loaded.name
    _refuse_cache(loaded, cache)
    if is_attached(model) and indexers is None:
        report = report_of(model)
        if overrides:
            own = take_off(model)
            try:
                report = put_on(model, own, **overrides)
            except ValueError:
                put_on(model, own)
                raise
        return report, loaded.name if report.trained else None
    if is_attached(model):
        detach(model)
    source = DEFAULT_MODEL if indexers is None and loaded.is_default else indexers
    return attach(model, indexers=source, **overrides), None if source is None else str(source)


@contextmanager
def sparse_while(
    loaded: LoadedModel, indexers: str | Path | None = None, *, cache: str | None = None, **overrides: Any
) -> Iterator[tuple[AttachReport, str | None]]:
    """Makes a model sparse while the context is open; afterwards it is as it was given, even if it was detached inside.

    Args:
        loaded: The model. What it is attached or accelerated with holds where nothing else is given.
        indexers: As in `attach_indexers`.
        cache: As in `attach_indexers`.
        **overrides: As in `attach_indexers`.

    Yields:
        What attaching or accelerating did, and where the indexers came from (`None` for untrained ones).

    Raises:
        ValueError: As `attach_indexers`.
        OSError: As `attach_indexers`.
    """
    model = loaded.model
    if born_with_dsa(model.config):
        _refuse_other_indexers(loaded, indexers)
        with accelerated(model, cache, **overrides) as report:
            yield report, loaded.name
        return
    _refuse_cache(loaded, cache)
    before = None
    if is_attached(model):
        before = take_off(model)
        put_on(model, before)
    try:
        yield attach_indexers(loaded, indexers, **overrides)
    finally:
        if is_attached(model):
            detach(model)
        if before is not None:
            put_on(model, before)


def _refuse_other_indexers(loaded: LoadedModel, indexers: str | Path | None) -> None:
    """Raises `ValueError` for indexers that are given for a model born with DSA."""
    if indexers is not None:
        raise ValueError(f"indexers: {loaded.name} has indexers of its own; leave them out")


def _refuse_cache(loaded: LoadedModel, cache: str | None) -> None:
    """Raises `ValueError` for a kind of cache that only models born with DSA have."""
    if cache not in (None, "full"):
        raise ValueError(
            f"cache: {loaded.name} was not born with DSA, and only the latents of such models are kept as {cache!r}; "
            "leave it out"
        )
