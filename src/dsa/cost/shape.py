"""The sizes of a model that decide what a token costs: attention, indexer, feed-forward blocks, vocabulary.

Every count is one of multiply-adds for one token or one pair of tokens, or of stored numbers; norms and biases are
left out of parameters, and elementwise operations (norms, RoPE, softmax, activations) out of multiply-adds.

Letters: `H`/`G` query / KV heads, `D`/`Dv` head dims of keys / values, `Hi`/`Di` index heads / index head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsa.config import DSAConfig

FP8_GROUP = 128
"""Latent dims of an FP8 row that share a scale."""


@dataclass(frozen=True)
class GroupedAttention:
    """Attention with keys and values of its own for each KV head: multi-head, grouped and multi-query.

    Args:
        hidden: Width of the hidden states.
        heads: `H`.
        kv_heads: `G`.
        key_dim: `D`.
        value_dim: `Dv`.
    """

    hidden: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def projections(self) -> int:
        """Q, K, V and the output: multiply-adds a token, and parameters."""
        keys = self.kv_heads * (self.key_dim + self.value_dim)
        return self.hidden * (self.heads * (self.key_dim + self.value_dim) + keys)

    def pair(self, absorbed: bool = False) -> int:
        """Score and weighted value of one token for all heads, `H (D + Dv)`; there is nothing to absorb."""
        return self.heads * (self.key_dim + self.value_dim)

    @property
    def cached(self) -> int:
        """Numbers of one token's K and V."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): the cache holds one latent a token.

    Expanded, every head has a key and a value made from the latent; absorbed, the two matrices that make them move to
    the query and to the output, and all heads read the latent itself. The absorbed form reads less and computes more:
    the expanded one serves dense prefill, the absorbed one decoding and all sparse attention.

    Args:
        hidden: Width of the hidden states.
        heads: `H`.
        query_latent: Width of the query's latent; `None` where queries come from the hidden states at once.
        latent: Width of the latent of keys and values.
        rope_dim: Dims of the key that carry RoPE, shared by the heads.
        plain_dim: Dims of a head's key without RoPE.
        value_dim: `Dv`.
    """

    hidden: int
    heads: int
    query_latent: int | None
    latent: int
    rope_dim: int
    plain_dim: int
    value_dim: int

    @property
    def projections(self) -> int:
        """All of them: multiply-adds a token, and parameters. Absorbing moves two of them and adds none."""
        queries = self.heads * (self.plain_dim + self.rope_dim)
        query = self.hidden * queries
        if self.query_latent is not None:
            query = self.query_latent * (self.hidden + queries)
        latent = self.hidden * (self.latent + self.rope_dim)
        expansion = self.latent * self.heads * (self.plain_dim + self.value_dim)
        return query + latent + expansion + self.heads * self.value_dim * self.hidden

    def pair(self, absorbed: bool = False) -> int:
        """One token for all heads: `H (plain + rope + Dv)` expanded, `H (2 latent + rope)` absorbed."""
        if absorbed:
            return self.heads * (2 * self.latent + self.rope_dim)
        return self.heads * (self.plain_dim + self.rope_dim + self.value_dim)

    @property
    def cached(self) -> int:
        """Numbers of one token's latent and RoPE dims."""
        return self.latent + self.rope_dim

    @property
    def fp8_row(self) -> int:
        """Bytes of one token's FP8 row: e4m3 latents, an fp32 scale for every 128 of them, RoPE dims in bf16."""
        return self.latent + 4 * -(-self.latent // FP8_GROUP) + 2 * self.rope_dim


@dataclass(frozen=True)
class IndexerShape:
    """The lightning indexer of one layer.

    Args:
        hidden: Width of the hidden states, from which keys and head weights come.
        query_from: Width of what index queries come from: the hidden states, or the query's latent.
        heads: `Hi`.
        head_dim: `Di`.
        dtype: `"int8"` and `"fp8"` keys carry one fp32 scale a token, `"fp32"` keys none.
        selections: `Gs`, selections of each query.
    """

    hidden: int
    query_from: int
    heads: int
    head_dim: int
    dtype: str = "int8"
    selections: int = 1

    @property
    def key_projection(self) -> int:
        """Multiply-adds of a token's index key, needed whether or not anything is scored."""
        return self.hidden * self.head_dim

    @property
    def query_projections(self) -> int:
        """Multiply-adds of a token's index queries and head weights, needed where tokens are scored."""
        return self.query_from * self.heads * self.head_dim + self.hidden * self.heads * self.selections

    @property
    def pair(self) -> int:
        """The score of one token: `Hi` dot products, and for each selection their weighted sum and the key's scale."""
        return self.heads * self.head_dim + self.selections * (self.heads + (self.dtype != "fp32"))

    @property
    def key_bytes(self) -> int:
        """One stored index key."""
        return 4 * self.head_dim if self.dtype == "fp32" else self.head_dim + 4


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block: one, or experts of which a token passes through a few.

    Args:
        hidden: Width of the hidden states.
        matrices: 3 for gated blocks (gate, up, down), 2 for plain ones.
        width: Inner width of the block, or of one expert.
        experts: Number of routed experts; 0 for a block without routing.
        active: Routed experts that a token passes through.
        shared_width: Inner width of what every token passes through in addition to the routed experts.
    """

    hidden: int
    matrices: int
    width: int
    experts: int = 0
    active: int = 0
    shared_width: int = 0

    @property
    def active_parameters(self) -> int:
        """Parameters that a token meets, the router's included: its multiply-adds."""
        if not self.experts:
            return self.matrices * self.hidden * self.width
        inner = self.active * self.width + self.shared_width
        return self.matrices * self.hidden * inner + self.hidden * self.experts

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.active_parameters + self.matrices * self.hidden * self.width * max(0, self.experts - self.active)


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer; `window` is how many tokens a sliding-window layer sees, `None` for full attention."""

    attention: GroupedAttention | LatentAttention
    feed_forward: FeedForward
    window: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal language model.

    Args:
        name: What the user called it.
        model_type: transformers' name of its architecture.
        hidden: Width of the hidden states.
        vocabulary: Rows of the embedding and of the language-modelling head.
        tied: Whether these two are one matrix.
        layers: First layer first.
        positions: Longest context that the configuration names, if it does.
        trained_dsa: The DSA that the model was trained with, for DeepSeek-V3.2 and GLM-5; `None` for others.
    """

    name: str
    model_type: str
    hidden: int
    vocabulary: int
    tied: bool
    layers: tuple[LayerShape, ...]
    positions: int | None = None
    trained_dsa: DSAConfig | None = None

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that see all earlier tokens."""
        return tuple(number for number, layer in enumerate(self.layers) if layer.window is None)

    def indexer(self, layer: int, config: DSAConfig) -> IndexerShape:
        """The indexer that a layer has under a config; latent attention makes its queries from its own latent."""
        attention = self.layers[layer].attention
        query_from = self.hidden
        if isinstance(attention, LatentAttention) and attention.query_latent is not None:
            query_from = attention.query_latent
        groups = attention.kv_heads if isinstance(attention, GroupedAttention) else 1
        return IndexerShape(
            self.hidden,
            query_from,
            config.index_heads,
            config.index_head_dim,
            config.index_dtype,
            config.layer_selections(layer, groups),
        )

    @property
    def head(self) -> int:
        """The language-modelling head: multiply-adds a token, and parameters."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """Of the dense model, without norms and biases."""
        blocks = sum(layer.attention.projections + layer.feed_forward.parameters for layer in self.layers)
        return blocks + self.head * (1 if self.tied else 2)

    @property
    def active_parameters(self) -> int:
        """Those that a token is multiplied with: without unused experts, and without the embedding's other rows."""
        active = (layer.attention.projections + layer.feed_forward.active_parameters for layer in self.layers)
        return sum(active) + self.head
