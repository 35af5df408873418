"""Index keys and queries in eight bits."""

from dsa.ops.quantize.api import quantize_index_keys, quantize_index_queries
from dsa.ops.quantize.reference import hadamard_transform, is_power_of_two
from dsa.ops.quantize.types import QuantizedKeys

__all__ = [
    "QuantizedKeys",
    "hadamard_transform",
    "is_power_of_two",
    "quantize_index_keys",
    "quantize_index_queries",
]
