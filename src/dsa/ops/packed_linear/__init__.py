"""Linear layers whose weights stay in blocks of 4 to 8 bits. Semantics: README.md."""

from dsa.ops.packed_linear.api import packed_linear, packed_rows
from dsa.ops.packed_linear.packing import pack_blocks, pack_weight
from dsa.ops.packed_linear.types import FORMATS, BlockFormat, PackedWeight

__all__ = ["FORMATS", "BlockFormat", "PackedWeight", "pack_blocks", "pack_weight", "packed_linear", "packed_rows"]
