"""What a whole model computes and moves for a token, a prompt or a request: part by part, dense or with DSA.

Counted are the multiply-adds of matrix products and of index scores, the comparisons of the selection, and the bytes
of weights and caches. Elementwise operations (norms, RoPE, softmax, activations, quantisation) are left out, and so
are activations on their way between parts.

Conventions, the same for dense and sparse:

- A decoded token that sees `n` tokens counts itself among them. It meets every active weight once.
- A layer of DSA scores nothing while a query sees at most `K` tokens; its index key is stored all the same.
- A prompt is one forward: weights are read once, the language-modelling head runs once, and where all queries read the
  same tokens (dense attention, the scan of index keys) `QUERIES_PER_READ` of them share a read. Queries that read
  selections of their own share nothing.
- Multi-head latent attention runs expanded in the dense prefill of a prompt, absorbed in decoding and wherever it
  reads a selection.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from dsa.config import DSAConfig
from dsa.cost.attention import kind_of, mean_read, mean_scanned
from dsa.cost.shape import FeedForward, GroupedAttention, LatentAttention, ModelShape

PARTS = (
    "attention_projections",
    "attention",
    "indexer_projections",
    "index_scan",
    "selection",
    "feed_forward",
    "lm_head",
)

QUERIES_PER_READ = 128
"""Queries of a prompt that share one read of the tokens that all of them see: the usual tile of fused kernels."""


@dataclass(frozen=True)
class Storage:
    """Bytes of one number: of the weights, and of K and V (or of the latents) in the cache.

    Args:
        weights: Of a weight.
        cache: Of a cached number.
        fp8_rows: Whether latents are cached as FP8 rows, 656 bytes a token for DeepSeek's sizes, in place of `cache` a
            number.

    Raises:
        ValueError: Not above zero.
    """

    weights: float = 2.0
    cache: float = 2.0
    fp8_rows: bool = False

    def __post_init__(self) -> None:
        for name in ("weights", "cache"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"bytes of one number of the {name} must be above 0, got {getattr(self, name)}")

    def row(self, attention: GroupedAttention | LatentAttention) -> float:
        """Bytes of one token in one layer's cache, its index key apart."""
        if self.fp8_rows and isinstance(attention, LatentAttention):
            return attention.fp8_row
        return attention.cached * self.cache


@dataclass(frozen=True)
class Work:
    """What a part of a model does.

    Args:
        multiply_adds: Of matrix products and index scores.
        comparisons: Scores held against the selection's threshold.
        weight_bytes: Weights read.
        cache_read: Bytes read from caches.
        cache_written: Bytes written to caches.
    """

    multiply_adds: float = 0.0
    comparisons: float = 0.0
    weight_bytes: float = 0.0
    cache_read: float = 0.0
    cache_written: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Work)))

    @property
    def bytes(self) -> float:
        """All that is moved."""
        return self.weight_bytes + self.cache_read + self.cache_written

    def to_json(self) -> dict[str, float]:
        """Plain JSON types."""
        return {**{field.name: getattr(self, field.name) for field in fields(Work)}, "bytes": self.bytes}


Parts = dict[str, Work]
"""The work of every part of `PARTS`."""


def decode_work(
    shape: ModelShape, config: DSAConfig | None, first: int, last: int, storage: Storage | None = None
) -> Parts:
    """Tokens decoded one after the other, the first of which sees `first` tokens and the last `last`.

    Args:
        shape: The model.
        config: Its DSA; `None` for dense.
        first: At least 1.
        last: At least `first`.
        storage: Bytes of a number.

    Raises:
        ValueError: `first` and `last` are not in order.
    """
    if not 1 <= first <= last:
        raise ValueError(f"first and last must satisfy 1 <= first <= last, got {first} and {last}")
    return _work(shape, config, first, last, storage or Storage(), prompt=False)


def prefill_work(shape: ModelShape, config: DSAConfig | None, tokens: int, storage: Storage | None = None) -> Parts:
    """A prompt of `tokens` tokens, read in one forward; arguments as in `decode_work`."""
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    return _work(shape, config, 1, tokens, storage or Storage(), prompt=True)


def prompt_token_work(
    shape: ModelShape, config: DSAConfig | None, position: int, storage: Storage | None = None
) -> Parts:
    """One token in the middle of a prompt, which sees `position` tokens: no head, and its share of shared reads.

    Arguments as in `decode_work`.
    """
    if position < 1:
        raise ValueError(f"position must be at least 1, got {position}")
    parts = _work(shape, config, position, position, storage or Storage(), prompt=True)
    return {**parts, "lm_head": Work()}


def request_work(
    shape: ModelShape, config: DSAConfig | None, tokens: int, decoded: int, storage: Storage | None = None
) -> Parts:
    """A prompt of `tokens` tokens and `decoded` further ones, each a forward of its own."""
    work = prefill_work(shape, config, tokens, storage)
    if decoded < 0:
        raise ValueError(f"decoded must not be negative, got {decoded}")
    if decoded:
        later = decode_work(shape, config, tokens + 1, tokens + decoded, storage)
        work = {part: work[part] + later[part] for part in PARTS}
    return work


def total(parts: Parts) -> Work:
    """The sum over the parts."""
    return sum(parts.values(), Work())


def _work(
    shape: ModelShape, config: DSAConfig | None, first: int, last: int, storage: Storage, *, prompt: bool
) -> Parts:
    """Queries that see `first` to `last` tokens, in one forward (`prompt`) or in one each."""
    queries = last - first + 1
    forwards = 1 if prompt else queries
    shared = QUERIES_PER_READ if prompt else 1
    parts = {part: Work() for part in PARTS}

    def add(part: str, **work: float) -> None:
        parts[part] += Work(**work)

    for number, layer in enumerate(shape.layers):
        attention = layer.attention
        kind, top_k = ("dense", layer.window) if layer.window is not None else kind_of(config, number)
        sparse = kind != "dense" and top_k is not None and last > top_k
        add(
            "attention_projections",
            multiply_adds=attention.projections * queries,
            weight_bytes=attention.projections * forwards * storage.weights,
        )
        pairs = queries * mean_read(first, last, top_k)
        absorbed = sparse or not prompt
        cached = storage.row(attention)
        row = cached if absorbed or isinstance(attention, GroupedAttention) else attention.pair() * storage.cache
        add(
            "attention",
            multiply_adds=pairs * attention.pair(absorbed),
            cache_read=pairs * row / (1 if sparse else shared),
            cache_written=queries * cached,
        )
        if kind == "sparse" and config is not None and top_k is not None:
            indexer = shape.indexer(number, config)
            # A prompt is projected as a whole; tokens that come alone are not, while nothing is scored.
            scoring = (queries if sparse else 0) if prompt else max(0, last - max(first - 1, top_k))
            scanned = queries * mean_scanned(first, last, top_k)
            read = indexer.key_projection * forwards
            read += indexer.query_projections * (min(1, scoring) if prompt else scoring)
            add(
                "indexer_projections",
                multiply_adds=indexer.key_projection * queries + indexer.query_projections * scoring,
                weight_bytes=read * storage.weights,
                cache_written=queries * indexer.key_bytes,
            )
            add(
                "index_scan",
                multiply_adds=scanned * indexer.pair,
                cache_read=scanned * indexer.key_bytes / shared,
            )
            add("selection", comparisons=scanned * indexer.selections)
        block = layer.feed_forward
        add(
            "feed_forward",
            multiply_adds=block.active_parameters * queries,
            weight_bytes=(_touched(block, queries) if prompt else block.active_parameters * queries) * storage.weights,
        )
    add("lm_head", multiply_adds=shape.head * forwards, weight_bytes=shape.head * forwards * storage.weights)
    return parts


def _touched(block: FeedForward, tokens: int) -> int:
    """Parameters that a forward of several tokens reads: at most as many experts as they have choices."""
    experts = max(0, min(block.experts, block.active * tokens) - block.active)
    return block.active_parameters + experts * block.matrices * block.hidden * block.width


@dataclass(frozen=True)
class Memory:
    """Bytes that one sequence and the model take.

    Args:
        weights: The model's, without norms, biases and indexers.
        indexers: The indexers' weights.
        keys_and_values: K and V (or latents) of all tokens; of sliding-window layers only the window.
        index_keys: Index keys of all tokens.
    """

    weights: float
    indexers: float
    keys_and_values: float
    index_keys: float

    def to_json(self) -> dict[str, float]:
        """Plain JSON types."""
        return {field.name: getattr(self, field.name) for field in fields(Memory)}


def memory(shape: ModelShape, config: DSAConfig | None, tokens: int, storage: Storage | None = None) -> Memory:
    """What `tokens` cached tokens take; arguments as in `decode_work`."""
    storage = storage or Storage()
    held = (storage.row(layer.attention) * min(tokens, layer.window or tokens) for layer in shape.layers)
    indexers = [] if config is None else [shape.indexer(number, config) for number in selecting_layers(shape, config)]
    projections = sum(indexer.key_projection + indexer.query_projections for indexer in indexers)
    return Memory(
        weights=shape.parameters * storage.weights,
        indexers=projections * storage.weights,
        keys_and_values=sum(held),
        index_keys=float(tokens * sum(indexer.key_bytes for indexer in indexers)),
    )


def selecting_layers(shape: ModelShape, config: DSAConfig) -> list[int]:
    """Numbers of the layers that have an indexer."""
    return [number for number in shape.full_layers if config.has_indexer(number)]


def budgets(shape: ModelShape, configs: Iterable[DSAConfig | None]) -> list[int]:
    """The different `K` of the layers that read selections, ascending."""
    found = (kind_of(config, number) for config in configs for number in shape.full_layers)
    return sorted({top_k for _, top_k in found if top_k is not None})
