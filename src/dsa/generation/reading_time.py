"""How long reading a prompt takes: before it begins, and how the work grows while it goes on.

Multiply-adds come from `dsa.cost`. An attention pair and an index pair take longer per multiply-add than a product of
large matrices, so they are weighted; the weights are of CPUs with AVX-512 and matter for the shape of the growth only.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch

from dsa.config import DSAConfig
from dsa.cost.work import prefill_work
from dsa.generation.room import loaded_shape, storage_of
from dsa.generation.session import PREFILL_CHUNK
from dsa.models.decoder import decoder_layers
from dsa.models.loading import LoadedModel

WEIGHTS = {"attention": 3.0, "index_scan": 1.0}
"""Time of a multiply-add of these parts, in multiply-adds of a linear layer."""
MEASURED_ROWS = 256
MEASURED_S = 0.2


def reading_work(loaded: LoadedModel, config: DSAConfig | None, tokens: int) -> Callable[[float], float] | None:
    """Work of reading the first so many tokens, in multiply-adds of a linear layer; `None` for unknown architectures.

    Within a chunk it grows evenly, since all of a chunk passes each layer before the next one.
    """
    try:
        shape, storage = loaded_shape(loaded), storage_of(loaded.model)
    except ValueError:
        return None
    ends = [*range(0, tokens, PREFILL_CHUNK), tokens]
    known = [0.0]
    for end in ends[1:]:
        parts = prefill_work(shape, config, end, storage)
        known.append(sum(WEIGHTS.get(name, 1.0) * part.multiply_adds for name, part in parts.items()))

    def work(position: float) -> float:
        number = min(bisect_right(ends, position), len(ends) - 1)
        start, end = ends[number - 1], ends[number]
        share = (min(position, end) - start) / max(1, end - start)
        return known[number - 1] + share * (known[number] - known[number - 1])

    return work


def expected_s(loaded: LoadedModel, work: float) -> float | None:
    """Seconds that so much work takes about, from a product of a layer of this model, measured now.

    Returns:
        `None` where a layer has no plain feed-forward part to measure.
    """
    layers = decoder_layers(loaded.model)
    part = getattr(layers[len(layers) // 2], "mlp", None) if layers else None
    if part is None or hasattr(part, "experts"):
        return None
    products = [each for each in part.modules() if hasattr(each, "in_features") and hasattr(each, "out_features")]
    each_row = sum(each.in_features * each.out_features for each in products)
    if not each_row:
        return None
    config: Any = loaded.model.config.get_text_config()
    rows = torch.randn(1, MEASURED_ROWS, config.hidden_size, dtype=loaded.model.dtype, device=loaded.model.device)
    best = float("inf")
    began = time.perf_counter()
    with torch.no_grad():
        while time.perf_counter() - began < MEASURED_S:
            start = time.perf_counter()
            part(rows)
            if loaded.model.device.type == "cuda":
                torch.cuda.synchronize(loaded.model.device)
            best = min(best, time.perf_counter() - start)
    return work / (each_row * MEASURED_ROWS) * best
