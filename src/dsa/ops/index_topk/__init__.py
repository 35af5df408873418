"""Scores of the lightning indexer and the selection of the best tokens."""

from dsa.ops.index_topk.api import index_topk

__all__ = ["index_topk"]
