"""The tasks of `dsa eval --tasks` on several texts, next to other selections: perplexity, attention kept, needles,
agreement of continuations."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dsa.config import DSAConfig
from dsa.documents.tokens import TextEncoder
from dsa.eval.agreement import agreement, choices, places_in
from dsa.eval.comparison import READERS, budget, contexts, text_losses
from dsa.eval.layers import LayerObserver, indexer_selection, suspect_layers
from dsa.eval.needle_cells import cells
from dsa.eval.needle_kinds import KINDS
from dsa.eval.needles import Haystack, Reply, ask, make_haystack
from dsa.eval.ratio import perplexity_ratio
from dsa.eval.selections import SELECTIONS, selection
from dsa.models.acceleration import cache_of
from dsa.models.context import DSAContext
from dsa.models.families import born_with_dsa
from dsa.models.loading import LoadedModel
from dsa.models.sparse import is_sparse, sparse_while
from dsa.runs.inputs import Document, encode, first_tokens
from dsa.runs.machine import describe_machine
from dsa.runs.progress import Progress, silent

TASKS = ("comparison", "perplexity", "mass", "needles", "agreement")
HAYSTACKS = 3
PLACES = 64
CONTINUATIONS = 8
NEW_TOKENS = 32
FORMAT = "dsa eval 1"


def parse_tasks(text: str) -> list[str]:
    """Names out of a list with commas.

    Raises:
        ValueError: No such task.
    """
    names = _chosen(text, TASKS, "tasks")
    if "comparison" in names and len(names) > 1:
        raise ValueError("tasks: comparison times whole models and runs alone; leave it out, or the others")
    return names


def parse_kinds(text: str) -> list[str]:
    """Kinds of needles out of a list with commas; `all` are all.

    Raises:
        ValueError: No such kind.
    """
    return list(KINDS) if text.strip() == "all" else _chosen(text, KINDS, "needle-kinds")


def _chosen(text: str, known: Sequence[str], argument: str) -> list[str]:
    """Names out of a list with commas, each once."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{argument}: expected some of {', '.join(known)}, got {name!r}{hint}")
    if not names:
        raise ValueError(f"{argument}: expected some of {', '.join(known)}, got none")
    return list(dict.fromkeys(names))


def parse_lengths(text: str) -> list[int]:
    """Numbers of tokens out of a list with commas.

    Raises:
        ValueError: Not whole numbers above zero.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"lengths: expected whole numbers with commas between them, such as 2048,4096, got {text!r}")
    return [int(part) for part in parts]


@dataclass(frozen=True)
class NeedleOptions:
    """What is planted, and in how long texts.

    Args:
        lengths: Tokens of the texts.
        kinds: Some of `dsa.eval.needle_kinds.KINDS`.
    """

    lengths: Sequence[int] = (2048, 4096)
    kinds: Sequence[str] = ("single",)


USUAL_NEEDLES = NeedleOptions()


def run_tasks(
    loaded: LoadedModel,
    documents: Sequence[Document],
    tasks: Sequence[str],
    *,
    tokens: int | None = None,
    top_k: int | None = None,
    local: int | None = None,
    cache: str | None = None,
    indexers: str | Path | None = None,
    needles: NeedleOptions = USUAL_NEEDLES,
    seed: int = 0,
    progress: Progress = silent,
    **kept: str | None,
) -> dict[str, Any]:
    """Measures texts; the second half of each counts.

    Args:
        loaded: The model. Afterwards it is as it was given.
        documents: The texts.
        tasks: Some of `TASKS`, `comparison` excepted.
        tokens: Positions read of each. `None`: 8,192, or the whole of a shorter text.
        top_k: Tokens read per query; `None` takes the indexers' own budgets.
        local: Most recent tokens always read.
        cache: As in `dsa.accelerate`, for models born with DSA. Attention mass is measured without a cache, so on
            latents that are not rounded.
        indexers: As in `dsa.attach`.
        needles: What is planted, and in how long texts.
        seed: Of the random selection and the needles.
        progress: Shows the steps.
        **kept: `index_dtype` and `kv_dtype`, as in `DSAConfig`; `None` as the indexers came with. Dense attention,
            which is compared, keeps keys and values as it computes.

    Returns:
        Plain JSON types. The same seed gives the same values, but for `seconds`.

    Raises:
        ValueError: A text is too short, the model has no trained indexers, or `dsa.attach` refuses.
    """
    began = time.perf_counter()
    texts = [encode(each, loaded.tokenizer, tokens) for each in documents]
    model = loaded.model
    haystacks = _haystacks(loaded, documents, needles, seed) if "needles" in tasks else {}
    changes = {name: kind for name, kind in kept.items() if kind is not None}
    with _measured(loaded, indexers, top_k, local, cache, changes) as (config, source):
        result: dict[str, Any] = {
            "format": FORMAT,
            "model": loaded.name,
            "tasks": list(tasks),
            "top_k": config.top_k,
            "seed": seed,
            "indexers": source,
            "born_with_dsa": born_with_dsa(model.config),
            "cache": cache_of(model),
            "config": config.to_dict(),
            "texts": [
                {"name": each.name, "tokens": ids.shape[1], "start": ids.shape[1] // 2}
                for each, ids in zip(documents, texts, strict=True)
            ],
        }
        if "perplexity" in tasks:
            result["perplexity"] = _perplexity(model, texts, config, seed, progress)
        if "mass" in tasks:
            result["mass"] = _mass(model, texts, config, seed, progress)
            result["suspect_layers"] = suspect_layers(result["mass"]["layers"])
        if "needles" in tasks:
            result["needles"] = _needles(model, haystacks, config, seed, progress)
        if "agreement" in tasks:
            result["agreement"] = _agreement(model, texts, config, seed, progress)
    result["environment"] = describe_machine(model.device)
    result["seconds"] = time.perf_counter() - began
    return result


@contextmanager
def _measured(
    loaded: LoadedModel,
    indexers: str | Path | None,
    top_k: int | None,
    local: int | None,
    cache: str | None,
    changes: dict[str, Any],
) -> Iterator[tuple[DSAConfig, str | None]]:
    """Makes a model sparse with one budget for its sparse layers; afterwards it is as it was given.

    Yields:
        Its configuration, and where the indexers came from.
    """
    own = is_sparse(loaded.model)
    with sparse_while(loaded, indexers, cache=cache) as (report, source):
        if indexers is None and not report.trained and not own:
            raise ValueError(
                f"model: {loaded.name} has no indexers, so there is nothing of DSA to measure: train them with "
                f"`dsa train {loaded.name} --data TEXTS --out DIR`, then pass --indexers DIR"
            )
        overrides = dict(changes)
        if top_k is not None:
            overrides |= budget(report.config, top_k, local)
        elif local is not None:
            overrides["local"] = local
        with sparse_while(loaded, **overrides) as (changed, _):
            yield changed.config, source


def _perplexity(
    model: Any, texts: Sequence[torch.Tensor], config: DSAConfig, seed: int, progress: Progress
) -> dict[str, dict[str, float]]:
    losses: dict[str, list[torch.Tensor]] = {}
    for reader in READERS:
        with progress(f"Perplexity: {reader}", len(texts)) as advance:
            losses[reader] = []
            for ids in texts:
                losses[reader].append(text_losses(model, ids, _start(ids), contexts(reader, config, seed)))
                advance()
    dense = losses["dense"]
    return {
        reader: {"perplexity": float(torch.cat(found).mean().exp()), **asdict(perplexity_ratio(found, dense))}
        for reader, found in losses.items()
    }


def _start(ids: torch.Tensor) -> int:
    return min(ids.shape[1] // 2, ids.shape[1] - 2)


@torch.no_grad()
def _mass(
    model: Any, texts: Sequence[torch.Tensor], config: DSAConfig, seed: int, progress: Progress
) -> dict[str, Any]:
    """Means over the texts; `layers` as `LayerObserver.figures` has them."""
    figures = []
    with progress("Attention kept", len(texts)) as advance:
        for ids in texts:
            others = {name: selection(name, config, seed) for name in SELECTIONS if name != "oracle"}
            observer = LayerObserver(config, {"dsa": indexer_selection(config), **others}, _start(ids))
            context = DSAContext(mode="dense", observer=observer)
            model(ids.to(model.device), use_cache=False, logits_to_keep=1, dsa_context=context)
            figures.append(observer.figures())
            advance()
    layers = [_mean(of_layer) for of_layer in zip(*figures, strict=True)]
    names = layers[0]["mass"] if layers else {}
    return {
        "kept": {name: sum(row["mass"][name] for row in layers) / len(layers) for name in names},
        "recall": {
            name: sum(row["recall"][name] for row in layers) / len(layers) for name in names if name != "oracle"
        },
        "layers": layers,
    }


def _mean(values: Sequence[Any]) -> Any:
    """Means of equal structures, number by number."""
    first = values[0]
    if isinstance(first, dict):
        return {name: _mean([each[name] for each in values]) for name in first}
    if isinstance(first, list):
        return [_mean(list(each)) for each in zip(*values, strict=False)]
    return first if isinstance(first, int) else sum(values) / len(values)


def _haystacks(
    loaded: LoadedModel, documents: Sequence[Document], needles: NeedleOptions, seed: int
) -> dict[tuple[str, int], list[Haystack]]:
    """Haystacks of every kind and length, the texts in turn; made before anything runs: a short text is refused.

    Each begins at a random place of its text, as far as `PLACES` times the longest go.
    """
    tokenizer = loaded.tokenizer
    encoder = TextEncoder(tokenizer)
    enough = PLACES * max(needles.lengths)
    texts = [first_tokens(each.text, enough, lambda part: encoder.text(part).ids)[:enough] for each in documents]
    return {
        (kind, length): [
            make_haystack(texts[number % len(texts)], tokenizer, length, seed + number, kind)
            for number in range(HAYSTACKS)
        ]
        for kind in needles.kinds
        for length in needles.lengths
    }


def _needles(
    model: Any,
    haystacks: dict[tuple[str, int], list[Haystack]],
    config: DSAConfig,
    seed: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """One row per kind, length and reader; `cells` has one for each tenth of the text and, last, one for all."""
    rows = []
    for (kind, length), made in haystacks.items():
        replies: list[dict[str, list[Reply]]] = [{} for _ in made]
        with progress(f"Needles ({kind}) in {length:,} tokens", len(made) * len(READERS)) as advance:
            for hay, by_reader in zip(made, replies, strict=True):
                for reader in READERS:
                    by_reader[reader] = ask(model, hay, contexts(reader, config, seed))
                    advance()
        for reader in READERS[1:]:
            found = cells(length, replies, reader)
            plain = [asdict(each) for each in found]
            rows.append({"kind": kind, "length": length, "reader": reader, "cells": plain})
    return rows


def _agreement(
    model: Any, texts: Sequence[torch.Tensor], config: DSAConfig, seed: int, progress: Progress
) -> dict[str, Any]:
    """By reader, over eight continuations of every text."""
    found: dict[str, list[list[int]]] = {reader: [] for reader in READERS}
    with progress("Agreement", len(texts) * len(READERS)) as advance:
        for ids in texts:
            places = places_in(ids.shape[1], _start(ids), CONTINUATIONS)
            dense: list[list[int]] | None = None
            for reader in READERS:
                own = choices(model, ids, places, contexts(reader, config, seed), NEW_TOKENS, dense)
                dense = dense or own
                found[reader] += own
                advance()
    return {reader: agreement(own, found["dense"]) for reader, own in found.items() if reader != "dense"}
