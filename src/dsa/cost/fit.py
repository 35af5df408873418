"""Whether a document's keys fit into memory, and how many tokens of it would: estimated before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from dsa.config import DSAConfig
from dsa.cost.shape import ModelShape
from dsa.cost.work import Storage, memory

STATES = 12
"""Hidden states' worth of memory that a layer holds apart from its feed-forward block: residual, normalised, queries,
keys, values and outputs, with what the allocator keeps of them."""


@dataclass(frozen=True)
class Room:
    """What reading takes.

    Args:
        shape: The model.
        config: Its DSA.
        chunk: Tokens read in one pass.
        storage: Bytes of a number.
    """

    shape: ModelShape
    config: DSAConfig | None
    chunk: int
    storage: Storage

    def bytes(self, tokens: int, *, in_file: bool = False) -> float:
        """Of keys, values, index keys and one pass, for so many tokens; the model's weights are not counted.

        Args:
            tokens: How many.
            in_file: Whether keys and values lie in a file and take no memory that cannot be given back.
        """
        held = memory(self.shape, self.config, tokens, self.storage)
        keys_and_values = 0 if in_file else held.keys_and_values
        return keys_and_values + held.index_keys + self._one_pass(min(tokens, self.chunk))

    def tokens(self, available: float) -> int:
        """The most tokens that take no more than `available` bytes; 0 where not even one does."""
        low, high = 0, 1
        while self.bytes(high) <= available:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.bytes(middle) <= available else (low, middle)
        return low

    def _one_pass(self, tokens: int) -> float:
        """Activations of one layer, and a selection of each query."""
        blocks = (layer.feed_forward for layer in self.shape.layers)
        width = max(
            block.matrices * (block.active * block.width or block.width) + block.shared_width for block in blocks
        )
        selected = 0 if self.config is None else 4 * self.config.top_k
        return tokens * ((STATES * self.shape.hidden + width) * self.storage.weights + 2 * selected)
