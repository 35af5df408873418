"""Caches in pages with a block table, in the layouts of the serving engines."""

from dsa.ops.paging.table import physical_indices
from dsa.ops.paging.types import PagedKeys, PagedLatents

__all__ = ["PagedKeys", "PagedLatents", "physical_indices"]
