"""Attention over the selected tokens."""

from dsa.ops.sparse_attention.api import sparse_attention

__all__ = ["sparse_attention"]
