"""Whether a long text fits into memory: what reading it takes, against what is free."""

from __future__ import annotations

from typing import Any

from dsa.config import DSAConfig
from dsa.cost import ModelShape, Storage, shape_from
from dsa.cost.fit import Room
from dsa.models.acceleration import cache_of
from dsa.models.extension import Demand
from dsa.models.loading import LoadedModel
from dsa.models.sparse import is_sparse, sparse_report_of
from dsa.modules.cache import kept_dtype
from dsa.runs.memory import available_memory


def check_room(
    loaded: LoadedModel, config: DSAConfig | None, demand: Demand, chunk: int, *, disk: int | None = None
) -> float | None:
    """Refuses a run whose keys and values do not fit into memory, before it begins.

    A model whose sizes `dsa.cost` does not know, and a device that does not say what is free, are let through.

    Args:
        loaded: The model, on its device.
        config: Its DSA; `None` for dense.
        demand: What is read and written.
        chunk: Tokens read in one pass.
        disk: Bytes that a store may take for keys and values that do not fit; `None` without a store.

    Returns:
        Bytes of keys and values, where they will lie in the store's file; else `None`.

    Raises:
        ValueError: It does not fit; the message says how many tokens of the document would.
    """
    available = available_memory(loaded.model.device)
    try:
        shape = loaded_shape(loaded)
    except ValueError:
        return None
    if available is None:
        return None
    room = Room(shape, config, chunk, storage_of(loaded.model))
    needed = room.bytes(demand.total)
    if needed <= available:
        return None
    in_file = room.bytes(demand.total, in_file=True)
    if disk is not None and loaded.model.device.type == "cpu" and in_file <= available and needed - in_file <= disk:
        return needed - in_file
    fitting = demand.fitting(room.tokens(available)) // 100 * 100
    advice = (
        f"about {fitting:,} tokens of the text would fit: give --tokens {fitting} or fewer --pages"
        if fitting
        else "not even a short text would fit: take a smaller model or a smaller --max-new-tokens"
    )
    raise ValueError(
        f"memory: reading {demand.prompt:,} tokens and writing up to {demand.new:,} takes about {needed / 1e9:,.1f} GB "
        f"for keys, values, index keys and one pass, and {available / 1e9:,.1f} GB are free; {advice}, or free memory"
    )


def loaded_shape(loaded: LoadedModel) -> ModelShape:
    """The sizes of a model in memory. Raises `ValueError` where `dsa.cost` does not know its architecture."""
    return shape_from(loaded.model.config.to_dict(), loaded.name)


def storage_of(model: Any) -> Storage:
    """Bytes of a number: a cache holds what the model computes with, what `kv_dtype` says, or FP8 rows."""
    kv_dtype = sparse_report_of(model).config.kv_dtype if is_sparse(model) else None
    kept = kept_dtype(model.dtype, kv_dtype).itemsize
    return Storage(model.dtype.itemsize, kept, fp8_rows=cache_of(model) == "fp8")
