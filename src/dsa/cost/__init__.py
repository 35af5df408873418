"""What a model costs, predicted: pairs, operations, bytes and memory as functions of length, K and sharing."""

from dsa.cost.attention import (
    NOTHING,
    AttentionShape,
    Cost,
    LayerKind,
    kind_of,
    layer_cost,
    mean_read,
    mean_scanned,
    model_cost,
)
from dsa.cost.crossing import crossing_point
from dsa.cost.model_config import shape_from
from dsa.cost.pairs import Pairs
from dsa.cost.report import config_for, model_report
from dsa.cost.shape import ModelShape
from dsa.cost.source import read_model
from dsa.cost.work import PARTS, Memory, Storage, Work, decode_work, memory, prefill_work, request_work, total

__all__ = [
    "NOTHING",
    "PARTS",
    "AttentionShape",
    "Cost",
    "LayerKind",
    "Memory",
    "ModelShape",
    "Pairs",
    "Storage",
    "Work",
    "config_for",
    "crossing_point",
    "decode_work",
    "kind_of",
    "layer_cost",
    "mean_read",
    "mean_scanned",
    "memory",
    "model_cost",
    "model_report",
    "prefill_work",
    "read_model",
    "request_work",
    "shape_from",
    "total",
]
