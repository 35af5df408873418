"""Building blocks that models are given: the indexer, and the cache that keeps its keys beside K and V."""

from dsa.modules.indexer import Indexer

__all__ = ["Indexer"]
