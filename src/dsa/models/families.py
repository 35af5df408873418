"""The model families that dsa runs sparse, and where each of them keeps things.

One row per transformers `model_type`, of three kinds: families with keys and values and families with multi-head latent
attention, which `dsa.attach` gives indexers, and families born with DSA, which `dsa.accelerate` runs with their own. A
family not in the table is refused by name: what differs between models (where RoPE goes, which layers see everything,
what the attention layer is handed) fails silently when it is guessed. Each row is tested against transformers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dsa.models.decoder import decoder_of
from dsa.ops.index_projection import Rope, rope_tables

if TYPE_CHECKING:
    # Only for types: `AutoConfig` comes here for a configuration class (see `dsa._auto_classes`).
    from transformers import PreTrainedConfig, PreTrainedModel

IMPLEMENTATION = "dsa"
"""What attached models have as their `attn_implementation`."""

RopeLayout = Literal["half", "interleaved"]
"""Which dims one angle turns: `i` and `i + R/2`, or `2i` and `2i + 1`."""


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


def _always(attention: nn.Module) -> bool:
    return True


@dataclass(frozen=True)
class Family:
    """How one family of models is built. Dims that one angle turns are named as in `RopeLayout`.

    Args:
        model_type: transformers' name, also that of the module `transformers.models.<module>`.
        causal_lm: Class of the causal language model.
        config: Class of its configuration.
        attention: Attribute of a decoder layer that holds its self-attention.
        layers: Attribute of the decoder that holds its layers.
        cache: Keyword under which the attention layer receives the cache.
        rope: How the model lays out the angles in `cos` and `sin`: `"half"` repeats the row of angles twice,
            `"interleaved"` repeats each angle twice, `"single"` has each once; `None` for models without RoPE.
        layer_has_rope: Whether a given full-attention layer applies RoPE.
        module: Module of transformers that has the classes, where it differs from `model_type`.
        latent: For families with multi-head latent attention, the dims that one angle turns in it; `"configured"`: as
            `config.rope_interleave` says. Their attention modules are replaced (`dsa.models.latent`). `None` for
            families with keys and values.
        index_rope: For families born with DSA, the dims that one angle turns in their own indexers; `None` for
            families without indexers.
        shares: As in `LatentLayout`, for families born with DSA.
    """

    model_type: str
    causal_lm: str
    config: str
    attention: str = "self_attn"
    layers: str = "layers"
    cache: str = "past_key_values"
    rope: RopeLayout | Literal["single"] | None = "half"
    layer_has_rope: Callable[[nn.Module], bool] = _always
    module: str | None = None
    latent: RopeLayout | Literal["configured"] | None = None
    index_rope: RopeLayout | None = None
    shares: bool = False

    @property
    def born_with_dsa(self) -> bool:
        """Whether its models come with indexers of their own."""
        return self.index_rope is not None

    @property
    def attention_class(self) -> str:
        """Name of the attention module's class, in families born with DSA."""
        return self.causal_lm.replace("ForCausalLM", "Attention")

    def config_class(self) -> type[PreTrainedConfig]:
        """The family's configuration class."""
        module = self.module or self.model_type
        source = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
        return getattr(source, self.config)

    def model_class(self) -> type[PreTrainedModel]:
        """The family's causal language model class."""
        module = self.module or self.model_type
        source = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        return getattr(source, self.causal_lm)

    def attention_layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """The self-attention modules, first layer first."""
        return [getattr(layer, self.attention) for layer in self.blocks(model)]

    def blocks(self, model: PreTrainedModel) -> list[nn.Module]:
        """The decoder's layers, first one first."""
        return list(getattr(decoder_of(model), self.layers))

    def latent_layout(self, config: PreTrainedConfig) -> LatentLayout:
        """How latent attention and its indexer turn their dims; new indexers are DeepSeek-V3.2's, so half-split."""
        assert self.latent is not None
        rope = self.latent
        if rope == "configured":
            rope = "interleaved" if config.rope_interleave else "half"
        return LatentLayout(rope, self.index_rope or "half", self.shares)

    def applies_rope(self, attention: nn.Module, position_embeddings: Any) -> bool:
        """Whether an attention layer that receives these `position_embeddings` rotates by them."""
        return self.rope is not None and position_embeddings is not None and self.layer_has_rope(attention)

    def rope_of(self, position_embeddings: tuple[torch.Tensor, torch.Tensor], rope_dim: int) -> Rope | None:
        """The indexer's angles out of the model's own, so that positions and RoPE scaling are the model's.

        The indexer has fewer dims than the model's heads: it takes evenly spaced frequencies out of the model's,
        the highest first.

        Args:
            position_embeddings: `cos, sin` as the layer receives them, `[B or 1, T, width]`.
            rope_dim: How many index dims to rotate at most.

        Returns:
            Tables `[B or 1, T, 2 * pairs]`, or `None` where there is nothing to rotate.
        """
        cos, sin = position_embeddings
        frequencies = cos.shape[-1] if self.rope == "single" else cos.shape[-1] // 2
        pairs = min(rope_dim // 2, frequencies)
        if pairs == 0:
            return None
        chosen = torch.arange(pairs, device=cos.device) * frequencies // pairs
        if self.rope == "interleaved":
            chosen = chosen * 2
        return rope_tables(cos[..., chosen], sin[..., chosen])


def _smollm3_has_rope(attention: nn.Module) -> bool:
    return bool(attention.use_rope)


def _never(attention: nn.Module) -> bool:
    return False


FAMILIES = {
    family.model_type: family
    for family in (
        Family("axk1", "AXK1ForCausalLM", "AXK1Config", latent="configured"),
        Family("cohere2", "Cohere2ForCausalLM", "Cohere2Config", rope="interleaved", layer_has_rope=_never),
        # DeepSeek-V2 hands its layers complex numbers, which have each angle once.
        Family("deepseek_v2", "DeepseekV2ForCausalLM", "DeepseekV2Config", rope="single", latent="interleaved"),
        Family("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", latent="configured"),
        Family("deepseek_v32", "DeepseekV32ForCausalLM", "DeepseekV32Config", latent="interleaved", index_rope="half"),
        Family("gemma", "GemmaForCausalLM", "GemmaConfig"),
        Family("gemma2", "Gemma2ForCausalLM", "Gemma2Config"),
        Family("gemma3_text", "Gemma3ForCausalLM", "Gemma3TextConfig", module="gemma3"),
        Family("glm4", "Glm4ForCausalLM", "Glm4Config"),
        Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", latent="configured"),
        Family(
            "glm_moe_dsa",
            "GlmMoeDsaForCausalLM",
            "GlmMoeDsaConfig",
            latent="interleaved",
            index_rope="interleaved",
            shares=True,
        ),
        Family("gpt2", "GPT2LMHeadModel", "GPT2Config", attention="attn", layers="h", rope=None),
        Family("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", attention="attention", cache="layer_past"),
        Family("gpt_oss", "GptOssForCausalLM", "GptOssConfig", rope="single"),
        Family("granite", "GraniteForCausalLM", "GraniteConfig"),
        Family("llama", "LlamaForCausalLM", "LlamaConfig"),
        Family("minicpm3", "MiniCPM3ForCausalLM", "MiniCPM3Config", latent="half"),
        Family("mistral", "MistralForCausalLM", "MistralConfig"),
        Family("mixtral", "MixtralForCausalLM", "MixtralConfig"),
        Family("olmo2", "Olmo2ForCausalLM", "Olmo2Config"),
        Family("phi3", "Phi3ForCausalLM", "Phi3Config"),
        Family("qwen2", "Qwen2ForCausalLM", "Qwen2Config"),
        Family("qwen3", "Qwen3ForCausalLM", "Qwen3Config"),
        Family("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", layer_has_rope=_smollm3_has_rope),
        Family("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config"),
        Family("youtu", "YoutuForCausalLM", "YoutuConfig", latent="configured"),
    )
}

ATTACHABLE = {name: family for name, family in FAMILIES.items() if not family.born_with_dsa}
"""The rows that `dsa.attach` takes."""

BORN_WITH_DSA = {name: family for name, family in FAMILIES.items() if family.born_with_dsa}
"""The rows that `dsa.accelerate` takes."""

REFUSED = {
    "axk2": "its queries and an output gate come out of one projection",
    "bailing_hybrid": "most of its layers are linear attention, which has nothing to select",
    "dots3_note": "it scales its latents, normalises the rotated key dims and gates its heads",
    "kimi_linear": "most of its layers are linear attention, which has nothing to select",
    "longcat_flash": "its layers have two attentions each, and scale queries and latents",
    "mistral4": "it scales queries by position",
    "mistral_large4_text": "it shares latents between layers and scales queries by position",
}
"""Why a family with latent attention, with or without indexers of its own, has no row."""


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
    family = ATTACHABLE.get(model_type)
    if family is not None:
        return family
    if born_with_dsa(given.config):
        raise ValueError(
            f"{name} has indexers of its own, so there is nothing to attach; dsa.accelerate(model) runs it sparse"
        )
    if not given.can_generate():
        raise ValueError(
            f"{name} ({model_type}) is not a causal language model (encoders see both sides of a token); "
            "dsa attaches to causal decoders only"
        )
    raise ValueError(
        f"{name}: dsa does not know the architecture {model_type!r}{_reason(model_type)}; it attaches to "
        f"{', '.join(sorted(ATTACHABLE))}. Adding one is a row in dsa/models/families.py and a test"
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


def full_attention_layers(config: PreTrainedConfig) -> list[bool]:
    """For each layer, whether its queries see all earlier tokens (and not only a window of them)."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    layer_types, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return [layer_type == "full_attention" for layer_type in layer_types]
