"""The model families that dsa runs sparse, and where each of them keeps things.

One row per transformers `model_type`, of three kinds: families with keys and values and families with multi-head latent
attention, which `dsa.attach` gives indexers, and families born with DSA, which `dsa.accelerate` runs with their own. A
family not in the table is refused by name: what differs between models (where RoPE goes, which layers see everything,
what the attention layer is handed) fails silently when it is guessed. Each row is tested against transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from dsa.models.decoder import decoder_layers
from dsa.models.refused import REFUSED
from dsa.ops.index_projection import Rope, rope_tables

if TYPE_CHECKING:
    # Only for types: `AutoConfig` comes here for a configuration class (see `dsa._auto_classes`).
    from transformers import PreTrainedConfig, PreTrainedModel

IMPLEMENTATION = "dsa"
"""What attached models have as their `attn_implementation`."""

RopeLayout = Literal["half", "interleaved"]
"""Which dims one angle turns: `i` and `i + R/2`, or `2i` and `2i + 1`."""

AngleLayout = RopeLayout | Literal["single"]


@dataclass(frozen=True)
class LatentLayout:
    """What differs between the latent attentions that dsa runs.

    In all of them the attention rotates the last dims of a query head and the row's last dims, the indexer the first
    of its own; index keys pass through a LayerNorm, and no layer has sink logits.

    Args:
        attention_rope: How the attention pairs the dims that RoPE turns.
        index_rope: How the indexer does.
        shares: Whether `config.indexer_types` may let a layer reuse the selection of the full layer before it.
    """

    attention_rope: RopeLayout = "interleaved"
    index_rope: RopeLayout = "half"
    shares: bool = False


RopeLayers = Literal["all", "none", "without_window", "use_rope", "force_rope"]
"""Which full-attention layers turn queries and keys: all, none, all where the model has no window at all
(`attention.sliding_window` is `None`), or those whose attention says so in this attribute."""

_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention", "mixer")


def attention_name(block: nn.Module) -> str | None:
    """The attribute of a decoder layer that holds its self-attention; `None` where it has none."""
    return next((name for name in _ATTENTION_NAMES if isinstance(getattr(block, name, None), nn.Module)), None)


@dataclass(frozen=True)
class Family:
    """What cannot be read from a model's modules. Dims that one angle turns are named as in `RopeLayout`.

    Args:
        model_type: transformers' name; its classes are those of transformers' own tables.
        rope: How the model lays out the angles in `cos` and `sin`, where its layers are handed any: `"half"` repeats
            the row of angles twice, `"interleaved"` repeats each angle twice, `"single"` has each once.
        rope_layers: Which full-attention layers turn by them.
        latent: For families with multi-head latent attention, the dims that one angle turns in it; `"configured"`: as
            `config.rope_interleave` says. Their attention modules are replaced (`dsa.models.latent`). `None` for
            families with keys and values.
        index_rope: For families born with DSA, the dims that one angle turns in their own indexers; `None` for
            families without indexers.
        shares: As in `LatentLayout`, for families born with DSA.
    """

    model_type: str
    rope: AngleLayout = "half"
    rope_layers: RopeLayers = "all"
    latent: RopeLayout | Literal["configured"] | None = None
    index_rope: RopeLayout | None = None
    shares: bool = False

    @property
    def born_with_dsa(self) -> bool:
        """Whether its models come with indexers of their own."""
        return self.index_rope is not None

    @property
    def causal_lm(self) -> str:
        """Name of the causal language model's class."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]

    @property
    def config(self) -> str:
        """Name of the configuration's class."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        return CONFIG_MAPPING_NAMES[self.model_type]

    @property
    def saved_class(self) -> str:
        """Name of the class that saved causal language models load as."""
        return self.saved_name(self.causal_lm)

    def saved_name(self, name: str) -> str:
        """The name of a class of transformers' with indexers; several families have one class, such as Llama's."""
        own = self.config.removesuffix("Config").removesuffix("Text")
        if name.startswith(own):
            return f"DSA{name}"
        return f"DSA{own}ForCausalLM" if name.endswith("ForCausalLM") else f"DSA{own}Model"

    @property
    def attention_class(self) -> str:
        """Name of the attention module's class, in families born with DSA."""
        return self.causal_lm.replace("ForCausalLM", "Attention")

    def config_class(self) -> type[PreTrainedConfig]:
        """The family's configuration class."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return CONFIG_MAPPING[self.model_type]

    def model_class(self) -> type[PreTrainedModel]:
        """The family's causal language model class."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        return cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[self.config_class()])

    def attention_layers(self, model: PreTrainedModel) -> list[Any]:
        """The self-attention modules, first layer first; `None` for layers without."""
        found = ((block, attention_name(block)) for block in self.blocks(model))
        return [None if name is None else getattr(block, name) for block, name in found]

    def blocks(self, model: PreTrainedModel) -> list[nn.Module]:
        """The decoder's layers, first one first."""
        return decoder_layers(model)

    def latent_layout(self, config: PreTrainedConfig) -> LatentLayout:
        """How latent attention and its indexer turn their dims; new indexers are DeepSeek-V3.2's, so half-split."""
        assert self.latent is not None
        rope = self.latent
        if rope == "configured":
            rope = "interleaved" if config.rope_interleave else "half"
        return LatentLayout(rope, self.index_rope or "half", self.shares)

    def applies_rope(self, attention: nn.Module, position_embeddings: Any) -> bool:
        """Whether an attention layer that receives these `position_embeddings` rotates by them."""
        if position_embeddings is None or self.rope_layers == "none":
            return False
        if self.rope_layers == "without_window":
            return attention.sliding_window is None
        return self.rope_layers == "all" or bool(getattr(attention, self.rope_layers))

    def rope_of(
        self, position_embeddings: tuple[torch.Tensor, torch.Tensor] | torch.Tensor, rope_dim: int
    ) -> Rope | None:
        """The indexer's angles out of the model's own, so that positions and RoPE scaling are the model's.

        The indexer has fewer dims than the model's heads: it takes evenly spaced frequencies out of the model's,
        the highest first.

        Args:
            position_embeddings: `cos, sin` as the layer receives them, `[B or 1, T, width]`, or complex numbers.
            rope_dim: How many index dims to rotate at most.

        Returns:
            Tables `[B or 1, T, 2 * pairs]`, or `None` where there is nothing to rotate.
        """
        if isinstance(position_embeddings, torch.Tensor):
            position_embeddings = position_embeddings.real, position_embeddings.imag
        cos, sin = position_embeddings
        frequencies = cos.shape[-1] if self.rope == "single" else cos.shape[-1] // 2
        pairs = min(rope_dim // 2, frequencies)
        if pairs == 0:
            return None
        chosen = torch.arange(pairs, device=cos.device) * frequencies // pairs
        if self.rope == "interleaved":
            chosen = chosen * 2
        return rope_tables(cos[..., chosen], sin[..., chosen])


_PLAIN = """
    apertus arcee aria_text bamba beam biogpt bitnet cohere_compass_text cwm dots1 ernie4_5 ernie4_5_moe flex_olmo
    gemma gemma2 gemma3_text gemma4_text gemma4_unified_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox granite
    granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe
    hy_v3 hyperclovax internlm3 iquestcoder jais2 jamba jetmoe laguna lfm2 lfm2_moe lfm3 llama mellum mimo_v2_flash
    minimax minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder nanochat nemotron_h olmo olmo2 olmo3
    olmo_hybrid olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe
    qwen3_next seed_oss solar_open starcoder2 vaultgemma
"""
"""Families of which all that matters is read from their modules."""

FAMILIES = {
    family.model_type: family
    for family in (
        *(Family(model_type) for model_type in _PLAIN.split()),
        Family("afmoe", rope_layers="none"),
        Family("axk1", latent="configured"),
        Family("cohere", rope="interleaved"),
        Family("cohere2", rope="interleaved", rope_layers="none"),
        Family("cohere2_moe", rope="interleaved", rope_layers="force_rope"),
        # DeepSeek-V2 hands its layers complex numbers, which have each angle once.
        Family("deepseek_v2", rope="single", latent="interleaved"),
        Family("deepseek_v3", latent="configured"),
        Family("deepseek_v32", latent="interleaved", index_rope="half"),
        Family("exaone4", rope_layers="without_window"),
        Family("exaone_moe", rope_layers="without_window"),
        Family("flint", rope_layers="none"),
        Family("glm4_moe_lite", latent="configured"),
        Family("glm_moe_dsa", latent="interleaved", index_rope="interleaved", shares=True),
        Family("gpt_oss", rope="single"),
        Family("kolibri1", rope_layers="without_window"),
        Family("llama4_text", rope="single", rope_layers="use_rope"),
        Family("minicpm3", latent="half"),
        Family("smollm3", rope_layers="use_rope"),
        Family("youtu", latent="configured"),
    )
}

INSIDE = {
    "gpt-sw3": "gpt2",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
"""Names whose causal language model is, as transformers loads it, one of the family on the right."""

ATTACHABLE = {name: family for name, family in FAMILIES.items() if not family.born_with_dsa}
"""The rows that `dsa.attach` takes."""

BORN_WITH_DSA = {name: family for name, family in FAMILIES.items() if family.born_with_dsa}
"""The rows that `dsa.accelerate` takes."""

NAMED = "dsa_family"
"""Attribute of a model whose row was given to `dsa.attach`, because the table has none."""


def name_family(model: PreTrainedModel, family: Family) -> None:
    """Has `family_of` find this row for a model that the table has none for.

    Raises:
        TypeError: Not a row.
        ValueError: The table has another row for the model.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family must be a dsa.Family, as `dsa check MODEL` prints it, got {type(family).__name__}")
    own = ATTACHABLE.get(model.config.model_type)
    if own not in (None, family):
        raise ValueError(f"family: {own.model_type!r} is in the table already ({own}); leave it out")
    if own is None:
        setattr(model, NAMED, family)


def forget_family(model: PreTrainedModel) -> None:
    """The inverse of `name_family`."""
    vars(model).pop(NAMED, None)


def born_with_dsa(config: PreTrainedConfig) -> bool:
    """Whether models of this configuration have indexers of their own and `dsa.accelerate` takes them."""
    return config.model_type in BORN_WITH_DSA


def family_of(model: object) -> Family:
    """The row of the table for a model to attach.

    Raises:
        TypeError: Not a transformers model.
        ValueError: The model is not a causal decoder, it was born with DSA, or its family is not in the table; the
            message names the model and the reason.
    """
    given = _checked(model)
    name, model_type = type(given).__name__, given.config.model_type.removeprefix("dsa_")
    if getattr(given.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; dsa attaches to causal decoders only")
    family = ATTACHABLE.get(model_type) or getattr(given, NAMED, None)
    if family is not None:
        return family
    if born_with_dsa(given.config):
        raise ValueError(
            f"{name} has indexers of its own, so there is nothing to attach; dsa.accelerate(model) runs it sparse"
        )
    if model_type in REFUSED:
        raise ValueError(f"{name}: dsa does not attach to {model_type!r}: {REFUSED[model_type]}")
    if not given.can_generate():
        raise ValueError(
            f"{name} ({model_type}) is not a causal language model (encoders see both sides of a token); "
            "dsa attaches to causal decoders only"
        )
    raise ValueError(
        f"{name}: dsa does not know the architecture {model_type!r}; `dsa check MODEL` tries it and says what it "
        f"needs. Known are {len(ATTACHABLE)} families: `dsa info --models`"
    )


def born_family_of(model: object) -> Family:
    """The row of the table for a model born with DSA.

    Raises:
        TypeError: Not a transformers model.
        ValueError: Its family is not in the table, or not born with DSA; the message names the model.
    """
    given = _checked(model)
    model_type = given.config.model_type
    family = BORN_WITH_DSA.get(model_type)
    if family is not None:
        return family
    raise ValueError(
        f"{type(given).__name__}: dsa.accelerate has no row for {model_type!r}{_reason(model_type)}; it takes models "
        f"born with DSA: {', '.join(sorted(BORN_WITH_DSA))}. Models without indexers of their own take dsa.attach"
    )


def _checked(model: object) -> PreTrainedModel:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        name, inside = type(model).__name__, getattr(model, "get_base_model", None)
        remedy = "; dsa works on the model inside it: pass model.get_base_model()" if callable(inside) else ""
        raise TypeError(f"model must be a transformers PreTrainedModel, got {name}{remedy}")
    return model


def _reason(model_type: str) -> str:
    return f" ({REFUSED[model_type]})" if model_type in REFUSED else ""


def layer_types(config: PreTrainedConfig) -> list[str]:
    """transformers' word for each layer: `"full_attention"`, `"sliding_attention"`, `"linear_attention"` and so on."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    return get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0]


def full_attention_layers(config: PreTrainedConfig) -> list[bool]:
    """For each layer, whether its queries see all earlier tokens (and not only a window of them, or a state)."""
    return [layer_type == FULL for layer_type in layer_types(config)]


FULL = "full_attention"
"""transformers' word for a layer whose queries see all earlier tokens."""


KEPT_LAYERS = {
    "sliding_attention": "sliding window",
    "chunked_attention": "attention within chunks",
    "linear_attention": "linear attention or a state space",
    "conv": "convolution",
    "dummy": "no attention, or the keys of an earlier layer",
}
"""What layers that stay as they are do, in words."""
