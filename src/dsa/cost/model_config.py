"""From a `config.json` to a model's sizes.

The file is read as it stands. transformers' configuration classes would fill what is missing with the sizes of some
other model, Llama-2-7B's for example, and the figures would be wrong without a word; here a missing size is an error
that names it. Only rules that a family's models follow themselves are applied, such as `head_dim = hidden / heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsa.config import DSAConfig, LayerConfig
from dsa.cost.shape import FeedForward, GroupedAttention, LatentAttention, LayerShape, ModelShape


class Fields:
    """A configuration's fields, and the errors about them.

    Args:
        raw: The parsed file.
        where: What to call it in messages.
    """

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def size(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """The first of these fields that is there, a whole number.

        Raises:
            ValueError: None is there and there is no default, or it is no such number.
        """
        for name in names:
            value = self.raw.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{self.where}: {name} must be a whole number of at least {least}, got {value!r}")
            return value
        if default is None:
            raise ValueError(f"{self.where}: the field {names[0]!r} is missing; complete the file, or name a preset")
        return default

    def maybe(self, name: str) -> int | None:
        """A size that may be absent or null."""
        return None if self.raw.get(name) is None else self.size(name)

    def kinds(self, name: str, layers: int, allowed: Mapping[str, bool]) -> list[bool] | None:
        """A list with one word a layer, as booleans; `None` where it is absent."""
        words = self.raw.get(name)
        if words is None:
            return None
        if not isinstance(words, list) or len(words) != layers:
            came = f"{len(words)} entries" if isinstance(words, list) else repr(words)
            raise ValueError(
                f"{self.where}: {name} must be a list with one word for each of {layers} layers, got {came}"
            )
        for word in words:
            if word not in allowed:
                raise ValueError(f"{self.where}: {name} holds {word!r}; known are {', '.join(sorted(allowed))}")
        return [allowed[word] for word in words]


def grouped_attention(fields: Fields) -> GroupedAttention:
    """Multi-head, grouped or multi-query attention; without `num_key_value_heads` every head has its own."""
    hidden, heads = fields.size("hidden_size", "n_embd"), fields.size("num_attention_heads", "n_head")
    if fields.raw.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"{fields.where}: the field 'head_dim' is missing, and hidden_size {hidden} is no multiple of {heads} heads"
        )
    dim = fields.size("head_dim", default=hidden // heads)
    groups = fields.size("num_key_value_heads", default=heads)
    if heads % groups:
        raise ValueError(f"{fields.where}: num_key_value_heads {groups} must divide num_attention_heads {heads}")
    return GroupedAttention(hidden, heads, groups, dim, dim)


def multi_head(fields: Fields) -> GroupedAttention:
    """Keys and values for every head, whatever else the file says: GPT-2 and GPT-NeoX have no groups."""
    hidden, heads = fields.size("hidden_size", "n_embd"), fields.size("num_attention_heads", "n_head")
    return GroupedAttention(hidden, heads, heads, hidden // heads, hidden // heads)


def latent_attention(fields: Fields) -> LatentAttention:
    """Multi-head latent attention. MiniCPM3's values have the width of a plain head unless the file says otherwise."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    implied = hidden // heads if fields.raw.get("model_type", "").endswith("minicpm3") else None
    return LatentAttention(
        hidden=hidden,
        heads=heads,
        query_latent=fields.maybe("q_lora_rank"),
        latent=fields.size("kv_lora_rank"),
        rope_dim=fields.size("qk_rope_head_dim"),
        plain_dim=fields.size("qk_nope_head_dim"),
        value_dim=fields.size("v_head_dim", default=implied),
    )


def gated(fields: Fields, layer: int) -> FeedForward:
    """Gate, up and down."""
    return FeedForward(fields.size("hidden_size"), 3, fields.size("intermediate_size"))


def plain(fields: Fields, layer: int) -> FeedForward:
    """Up and down; GPT-2's inner width is four times the outer one unless `n_inner` says otherwise."""
    hidden = fields.size("hidden_size", "n_embd")
    implied = 4 * hidden if fields.raw.get("model_type", "").endswith("gpt2") else None
    return FeedForward(hidden, 2, fields.size("intermediate_size", "n_inner", default=implied))


def routed(fields: Fields, layer: int) -> FeedForward:
    """Gated experts in every layer, as Mixtral and gpt-oss have them."""
    active = fields.size("num_experts_per_tok", "experts_per_token")
    experts = fields.size("num_local_experts")
    return FeedForward(fields.size("hidden_size"), 3, fields.size("intermediate_size"), experts, active)


def routed_qwen3(fields: Fields, layer: int) -> FeedForward:
    """Gated experts in every `decoder_sparse_step`-th layer, but for `mlp_only_layers`."""
    step = fields.size("decoder_sparse_step", default=1)
    if layer in (fields.raw.get("mlp_only_layers") or ()) or (layer + 1) % step:
        return gated(fields, layer)
    experts, active = fields.size("num_experts", "num_local_experts"), fields.size("num_experts_per_tok")
    return FeedForward(fields.size("hidden_size"), 3, fields.size("moe_intermediate_size"), experts, active)


def routed_deepseek(fields: Fields, layer: int) -> FeedForward:
    """Plain gated blocks in the first layers, then routed experts and shared ones."""
    layers = fields.size("num_hidden_layers")
    sparse = fields.kinds("mlp_layer_types", layers, {"dense": False, "sparse": True})
    if not (sparse[layer] if sparse is not None else layer >= fields.size("first_k_dense_replace", least=0)):
        return gated(fields, layer)
    width = fields.size("moe_intermediate_size")
    return FeedForward(
        fields.size("hidden_size"),
        3,
        width,
        fields.size("n_routed_experts"),
        fields.size("num_experts_per_tok"),
        width * fields.size("n_shared_experts", least=0),
    )


def no_windows(fields: Fields, layers: int) -> list[bool]:
    """Full attention everywhere."""
    return [False] * layers


def windows_everywhere(fields: Fields, layers: int) -> list[bool]:
    """A `sliding_window` that is set holds for all layers."""
    return [fields.maybe("sliding_window") is not None] * layers


def windows_listed(fields: Fields, layers: int) -> list[bool]:
    """As `layer_types` says, which must be there where there is a window."""
    if fields.maybe("sliding_window") is not None:
        raise ValueError(f"{fields.where}: the field 'layer_types' is missing; complete the file, or name a preset")
    return [False] * layers


def windows_on_request(fields: Fields, layers: int) -> list[bool]:
    """Only with `use_sliding_window`, from layer `max_window_layers` on."""
    if not fields.raw.get("use_sliding_window") or fields.maybe("sliding_window") is None:
        return [False] * layers
    first = fields.size("max_window_layers", least=0)
    return [layer >= first for layer in range(layers)]


def windows_but_every(period: int) -> Callable[[Fields, int], list[bool]]:
    """Full attention in every `period`-th layer, a window in the others."""

    def windows(fields: Fields, layers: int) -> list[bool]:
        every = fields.size("sliding_window_pattern", default=period)
        return [bool((layer + 1) % every) for layer in range(layers)]

    return windows


@dataclass(frozen=True)
class Family:
    """How one architecture's fields are read.

    Args:
        feed_forward: The block of one layer.
        attention: The attention of every layer.
        windows: Which layers see a sliding window only, where the file has no `layer_types`.
        dsa: Whether the model was trained with DSA.
    """

    feed_forward: Callable[[Fields, int], FeedForward] = gated
    attention: Callable[[Fields], GroupedAttention | LatentAttention] = grouped_attention
    windows: Callable[[Fields, int], list[bool]] = no_windows
    dsa: bool = False


FAMILIES = {
    "apertus": Family(plain),
    "arcee": Family(plain),
    "axk1": Family(routed_deepseek, latent_attention),
    "bitnet": Family(),
    "cohere": Family(),
    "cohere2": Family(windows=windows_but_every(4)),
    "cohere_compass_text": Family(windows=windows_listed),
    "cwm": Family(windows=windows_listed),
    "deepseek_v2": Family(routed_deepseek, latent_attention),
    "deepseek_v3": Family(routed_deepseek, latent_attention),
    "deepseek_v32": Family(routed_deepseek, latent_attention, dsa=True),
    "dots1": Family(routed_deepseek, windows=windows_listed),
    "ernie4_5": Family(),
    "exaone4": Family(windows=windows_listed),
    "gemma": Family(),
    "gemma2": Family(windows=windows_but_every(2)),
    "gemma3_text": Family(windows=windows_but_every(6)),
    "glm": Family(),
    "glm4": Family(),
    "glm4_moe": Family(routed_deepseek),
    "glm4_moe_lite": Family(routed_deepseek, latent_attention),
    "glm_moe_dsa": Family(routed_deepseek, latent_attention, dsa=True),
    "gpt2": Family(plain, multi_head),
    "gpt_neox": Family(plain, multi_head),
    "gpt_oss": Family(routed, windows=windows_but_every(2)),
    "granite": Family(),
    "granite_swa": Family(windows=windows_listed),
    "granitemoe": Family(routed),
    "granitemoe_swa": Family(routed, windows=windows_listed),
    "granitemoeshared": Family(routed),
    "helium": Family(),
    "hunyuan_v1_dense": Family(),
    "hyperclovax": Family(),
    "internlm3": Family(),
    "iquestcoder": Family(),
    "jais2": Family(plain),
    "llama": Family(),
    "mellum": Family(routed_qwen3, windows=windows_listed),
    "minicpm3": Family(gated, latent_attention),
    "minimax_m2": Family(routed, windows=windows_listed),
    "ministral": Family(windows=windows_listed),
    "ministral3": Family(windows=windows_everywhere),
    "mistral": Family(windows=windows_everywhere),
    "mixtral": Family(routed, windows=windows_everywhere),
    "nanochat": Family(plain),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(windows=windows_listed),
    "persimmon": Family(plain),
    "phi": Family(plain),
    "phi3": Family(windows=windows_everywhere),
    "phimoe": Family(routed, windows=windows_everywhere),
    "qwen2": Family(windows=windows_on_request),
    "qwen3": Family(windows=windows_on_request),
    "qwen3_moe": Family(routed_qwen3, windows=windows_on_request),
    "seed_oss": Family(),
    "smollm3": Family(windows=windows_on_request),
    "starcoder2": Family(plain, windows=windows_everywhere),
    "vaultgemma": Family(windows=windows_listed),
    "youtu": Family(gated, latent_attention),
}

TIED_UNLESS_SAID = True
"""What transformers writes only where it differs."""

_LAYER_TYPES = {"full_attention": False, "sliding_attention": True, "indexed_attention": False}


def shape_from(raw: Mapping[str, Any], name: str) -> ModelShape:
    """A model's sizes out of its parsed `config.json`.

    Args:
        raw: The file's fields; those of a `text_config` inside it where there is one.
        name: What to call the model in messages.

    Raises:
        ValueError: The architecture is not known, or a field is missing or no size; the message names it.
    """
    text = raw.get("text_config")
    fields = Fields(text if isinstance(text, Mapping) else raw, f"model {name}")
    model_type = fields.raw.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{fields.where}: the field 'model_type' is missing; is this a model's config.json?")
    model_type = model_type.removeprefix("dsa_")
    family = FAMILIES.get(model_type)
    if family is None:
        raise ValueError(
            f"{fields.where}: the cost of the architecture {model_type!r} is not known; known are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    count = fields.size("num_hidden_layers", "n_layer")
    attention = family.attention(fields)
    sliding = fields.kinds("layer_types", count, _LAYER_TYPES)
    if sliding is None:
        sliding = family.windows(fields, count)
    window = fields.size("sliding_window") if any(sliding) else None
    layers = tuple(
        LayerShape(attention, _checked(fields, family.feed_forward(fields, layer)), window if sliding[layer] else None)
        for layer in range(count)
    )
    return ModelShape(
        name=name,
        model_type=model_type,
        hidden=attention.hidden,
        vocabulary=fields.size("vocab_size"),
        tied=bool(fields.raw.get("tie_word_embeddings", raw.get("tie_word_embeddings", TIED_UNLESS_SAID))),
        layers=layers,
        positions=fields.maybe("max_position_embeddings") or fields.maybe("n_positions"),
        trained_dsa=_trained_dsa(fields, count) if family.dsa else None,
    )


def _checked(fields: Fields, block: FeedForward) -> FeedForward:
    if block.active > block.experts:
        raise ValueError(
            f"{fields.where}: {block.active} experts per token are more than the {block.experts} there are"
        )
    return block


def _trained_dsa(fields: Fields, layers: int) -> DSAConfig:
    """The budget and sharing that the model was trained with; it has no tokens that are always read.

    GLM-5's layers are "full" or "shared", which reuse the selection of the full layer before them. Without
    `indexer_types` the pattern or the period in the file decides.
    """
    full = _indexer_types(fields, layers)
    if not full[0]:
        raise ValueError(f"{fields.where}: the first layer shares a selection, but there is none before it")
    shared, source = {}, 0
    for layer, own in enumerate(full):
        if own:
            source = layer
        else:
            shared[layer] = LayerConfig(share=source)
    return DSAConfig(
        top_k=fields.size("index_topk"),
        index_heads=fields.size("index_n_heads"),
        index_head_dim=fields.size("index_head_dim"),
        sinks=0,
        local=0,
        layers=shared,
    )


def _indexer_types(fields: Fields, layers: int) -> list[bool]:
    words = {"full": True, "shared": False}
    named = fields.kinds("indexer_types", layers, words)
    if named is not None:
        return named
    pattern = fields.raw.get("index_topk_pattern")
    if pattern is not None:
        letters = {"F": "full", "S": "shared"}
        listed = [letters.get(letter, letter) for letter in pattern]
        named = Fields({"index_topk_pattern": listed}, fields.where).kinds("index_topk_pattern", layers, words)
        assert named is not None
        return named
    period = fields.size("index_topk_freq", default=1)
    offset = fields.size("index_skip_topk_offset", default=2, least=0)
    return [max(layer - offset + 1, 0) % period == 0 for layer in range(layers)]
