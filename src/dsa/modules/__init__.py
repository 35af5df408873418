"""Building blocks that attaching adds to models: the indexer, and the cache that keeps its keys next to K and V."""

from dsa.modules.indexer import Indexer

__all__ = ["Indexer"]
