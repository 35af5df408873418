"""The model classes whose own indexers dsa runs, and what differs between them.

One row per transformers `model_type`; each is tested against transformers' own path. Layouts of RoPE fail silently when
they are guessed, so a class without a row is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dsa.models.decoder import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

RopeLayout = Literal["half", "interleaved"]
"""Which dims one angle turns: `i` and `i + R/2`, or `2i` and `2i + 1`."""


@dataclass(frozen=True, kw_only=True)
class LatentLayout:
    """What differs between the latent attentions that dsa runs.

    In all of them the attention rotates the last dims of a query head and the row's last dims, the indexer the first
    of its own; index keys pass through a LayerNorm, and no layer has sink logits.

    Args:
        index_rope: How the indexer pairs the dims that RoPE turns.
        attention_rope: How the attention does.
        shares: Whether `config.indexer_types` may let a layer reuse the selection of the full layer before it.
    """

    index_rope: RopeLayout
    attention_rope: RopeLayout = "interleaved"
    shares: bool = False


@dataclass(frozen=True)
class NativeFamily(LatentLayout):
    """How one family keeps its indexer and its attention.

    Args:
        model_type: transformers' name, also that of the module `transformers.models.<module>`.
        causal_lm: Class of the causal language model.
        config: Class of its configuration.
        attention: Class of the attention module that is replaced.
    """

    model_type: str
    causal_lm: str
    config: str
    attention: str


NATIVE_FAMILIES = {
    family.model_type: family
    for family in (
        NativeFamily(
            "deepseek_v32", "DeepseekV32ForCausalLM", "DeepseekV32Config", "DeepseekV32Attention", index_rope="half"
        ),
        NativeFamily(
            "glm_moe_dsa",
            "GlmMoeDsaForCausalLM",
            "GlmMoeDsaConfig",
            "GlmMoeDsaAttention",
            index_rope="interleaved",
            shares=True,
        ),
    )
}

REASONS = {
    "axk2": "its queries and an output gate come out of one projection",
    "dots3_note": "it scales its latents, normalises the rotated key dims and gates its heads",
    "mistral_large4_text": "it shares latents between layers and scales queries by position",
}
"""Why a class that has an indexer has no row."""


def is_native(config: PreTrainedConfig) -> bool:
    """Whether `dsa.accelerate` takes models of this configuration."""
    return config.model_type in NATIVE_FAMILIES


def native_family_of(model: object) -> NativeFamily:
    """The row of the table for a model.

    Raises:
        TypeError: Not a transformers model.
        ValueError: Its class is not in the table; the message names it.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    model_type = model.config.model_type
    family = NATIVE_FAMILIES.get(model_type)
    if family is not None:
        return family
    reason = f" ({REASONS[model_type]})" if model_type in REASONS else ""
    raise ValueError(
        f"{type(model).__name__}: dsa.accelerate has no row for {model_type!r}{reason}; it takes models born with DSA: "
        f"{', '.join(sorted(NATIVE_FAMILIES))}. Models without indexers of their own take dsa.attach"
    )


def sources(model: PreTrainedModel, family: NativeFamily) -> list[int | None]:
    """For each layer the earlier layer whose selection it reuses, `None` where it selects for itself.

    Raises:
        ValueError: A layer shares before any layer selects, or the list has another length than the model.
    """
    layers = model.config.num_hidden_layers
    kinds = list(model.config.indexer_types) if family.shares else ["full"] * layers
    if len(kinds) != layers:
        raise ValueError(f"config.indexer_types has {len(kinds)} entries for {layers} layers; give one for each")
    found: list[int | None] = []
    full = None
    for layer, kind in enumerate(kinds):
        if kind not in ("full", "shared"):
            raise ValueError(f"config.indexer_types[{layer}] must be 'full' or 'shared', got {kind!r}")
        if kind == "full":
            full = layer
        elif full is None:
            raise ValueError(
                f"config.indexer_types makes layer {layer} reuse the selection of a full layer before it, and there is "
                "none; the first layer must be 'full'"
            )
        found.append(None if kind == "full" else full)
    return found


def check_indexers(model: PreTrainedModel, family: NativeFamily) -> None:
    """Holds every layer's indexer against the configuration.

    Raises:
        ValueError: A part is missing, an indexer stands where the configuration has none, or a weight has another
            size than the configuration says; the message names the weight.
    """
    config = model.config
    heads, dim = config.index_n_heads, config.index_head_dim
    wanted = {
        "wq_b.weight": (heads * dim, config.q_lora_rank),
        "wk.weight": (dim, config.hidden_size),
        "k_norm.weight": (dim,),
        "k_norm.bias": (dim,),
        "weights_proj.weight": (heads, config.hidden_size),
    }
    for layer, (block, source) in enumerate(zip(decoder_layers(model), sources(model, family))):
        attention = block.self_attn
        name = f"layers.{layer}.self_attn.indexer"
        indexer = getattr(attention, "indexer", None)
        if type(attention).__name__ != family.attention:
            raise ValueError(
                f"layers.{layer}.self_attn of {type(model).__name__} is a {type(attention).__name__}, expected "
                f"{family.attention}: it has been replaced already; restore it first"
            )
        if source is not None:
            if indexer is not None:
                raise ValueError(
                    f"{name} is there, but config.indexer_types[{layer}] is 'shared': the layer would not use it; "
                    "correct the configuration or remove the weights"
                )
            continue
        weights = {} if indexer is None else dict(indexer.named_parameters())
        missing = [part for part in wanted if part not in weights]
        if missing:
            raise ValueError(f"{name}.{missing[0]} is missing, and layer {layer} selects for itself; load it first")
        extra = sorted(set(weights) - set(wanted))
        if extra:
            raise ValueError(f"{name}.{extra[0]} is a weight that {family.model_type} indexers do not have")
        for part, shape in wanted.items():
            if tuple(weights[part].shape) != shape:
                raise ValueError(
                    f"{name}.{part} is {list(weights[part].shape)}, but the configuration makes it {list(shape)} "
                    f"(index_n_heads={heads}, index_head_dim={dim}, q_lora_rank={config.q_lora_rank}, "
                    f"hidden_size={config.hidden_size}); one of them is wrong"
                )
