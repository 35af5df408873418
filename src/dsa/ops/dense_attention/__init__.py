"""Attention over all visible tokens."""

from dsa.ops.dense_attention.api import dense_attention

__all__ = ["dense_attention"]
