"""How far the indexer is from the attention that it predicts."""

from dsa.ops.indexer_loss.api import indexer_loss

__all__ = ["indexer_loss"]
