"""What a reading cost, and what dense attention would have cost in its place.

After the answer, a few tokens are read once more dense and once more sparse into the same cache. The difference is what
dense attention costs: measured for decoding, and carried over to the prefill, unless the dense prefill itself is asked
for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch

from dsa.generation.session import Session
from dsa.models.context import DSAContext
from dsa.modules.cache import IndexedLayer
from dsa.report.explanation import Cost
from dsa.report.recording import Recorder
from dsa.runs.machine import peak_rss_mb, reset_peak_rss
from dsa.runs.progress import Progress

PROBE = 32
"""Tokens read once more, dense and sparse, to compare their times."""

Mode = Literal["dense", "sparse"]
MODES: tuple[Mode, Mode] = ("dense", "sparse")


def costs(
    session: Session,
    ids: Sequence[int],
    recorder: Recorder,
    seconds: tuple[float, float | None],
    has_peak: bool,
    measure_dense: bool,
    progress: Progress,
) -> tuple[Cost, Cost]:
    """What DSA cost, and dense attention.

    Args:
        session: What read the prompt and wrote the answer.
        ids: The prompt.
        recorder: What observed it.
        seconds: For reading the prompt, and for a token of the answer where it has more than one.
        has_peak: Whether peak memory was counted anew for this reading.
        measure_dense: Read the prompt once more with dense attention, in place of estimating its time.
        progress: Shows the steps.
    """
    tokens, held = len(ids), session.timings.held
    prefill_s, decode_s = seconds
    peak = peak_rss_mb() if has_peak else None
    read = [each.read / (tokens - held) for each in recorder.counts.values()]
    dense_prefill: float | None = None
    dense_decode: float | None = None
    both = _probe(session, ids[-PROBE:], progress)
    if both is not None:
        (dense_chunk, sparse_chunk), (dense_step, sparse_step) = both
        decode_s = sparse_step if decode_s is None else decode_s
        dense_decode = decode_s + dense_step - sparse_step
        # Per query the difference grows with what it sees, from nothing at K tokens on.
        first, last = (max(0, seen - recorder.config.top_k) for seen in (held, tokens))
        beyond = (last**2 - first**2) / (2 * last) if last else 0.0
        dense_prefill = prefill_s + (dense_chunk - sparse_chunk) / min(PROBE, tokens) * beyond
    sizes = _cache_mb(session.cache, tokens)
    dsa = Cost(prefill_s, decode_s, sum(sizes), sum(read) / max(1, len(read)), peak)
    dense_peak = None
    if measure_dense:
        model = session.model
        # Its cache goes before the dense one comes, unless the caller keeps it.
        session.empty()
        dense_prefill, dense_peak = _read_dense(model, ids, progress)
    return dsa, Cost(dense_prefill, dense_decode, sizes[0], (held + tokens + 1) / 2, dense_peak, not measure_dense)


def _probe(session: Session, ids: Sequence[int], progress: Progress) -> list[tuple[float, float]] | None:
    """Seconds `(dense, sparse)` of a chunk and of one token after what is held; `None` where a cache cannot be
    cropped."""
    if not all(isinstance(layer, IndexedLayer) for layer in session.cache.layers):
        return None
    held = len(session.token_ids)
    times = []
    with progress("Dense attention on the last tokens, to compare", 2) as advance:
        for part in (ids, ids[-1:]):
            pair = []
            for mode in MODES:
                best = float("inf")
                for _ in range(2):
                    with session.using(lambda mode=mode: DSAContext(mode=mode)):  # type: ignore[misc]
                        began = time.perf_counter()
                        session.feed(part)
                        best = min(best, time.perf_counter() - began)
                    session.crop(held)
                pair.append(best)
            times.append((pair[0], pair[1]))
            advance()
    return times


def _read_dense(model: Any, ids: Sequence[int], progress: Progress) -> tuple[float, float | None]:
    """Seconds and peak memory of the same prefill with dense attention."""
    session = Session(model)
    has_peak = reset_peak_rss()
    with session.using(lambda: DSAContext(mode="dense")):
        session.read(ids, progress=progress)
    return session.timings.read_s, peak_rss_mb() if has_peak else None


def _cache_mb(cache: Any, tokens: int) -> tuple[float, float]:
    """MB of keys and values, and of index keys, of the prompt's tokens."""
    kv = index = 0.0
    for layer in cache.layers:
        keys, values = layer.keys, layer.values
        per_token = sum(each[0, :, 0].numel() * each.element_size() for each in (keys, values))
        kv += per_token * tokens
        if isinstance(layer, IndexedLayer) and layer.index_dtype is not None:
            stored = layer.index_keys()
            width = stored.shape[-1] if isinstance(stored, torch.Tensor) else stored.data.shape[-1]
            index += tokens * (width * 4 if isinstance(stored, torch.Tensor) else width + 4)
    return kv / 1e6, index / 1e6
