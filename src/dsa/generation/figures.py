"""What reading a prompt and writing an answer took, next to what dense attention would have taken."""

from __future__ import annotations

from typing import Any

from dsa.cost.run import run_cost
from dsa.generation.room import loaded_shape, storage_of
from dsa.generation.session import Timings
from dsa.models.attached import AttachReport
from dsa.models.loading import LoadedModel


def run_figures(loaded: LoadedModel, report: AttachReport, timings: Timings) -> dict[str, Any]:
    """Measured times and counted work in plain JSON types.

    Returns:
        `measured` with `read_s` and `token_s`; `counted`, or `None` with `not_counted` saying why.
    """
    counted, problem = None, None
    try:
        shape, storage = loaded_shape(loaded), storage_of(loaded.model)
        counted = run_cost(shape, report.config, timings.read, timings.written, storage)
    except ValueError as error:
        problem = str(error)
    return {
        "tokens_read": timings.read,
        "tokens_opened": timings.held,
        "tokens_written": timings.written,
        "first_token_s": timings.first_token_s,
        "token_ms": None if timings.token_s is None else 1e3 * timings.token_s,
        "measured": {"read_s": timings.read_s, "token_s": timings.token_s},
        "counted": counted,
        "not_counted": problem,
        "config": report.config.to_dict(),
        "indexers_trained": report.trained,
    }
