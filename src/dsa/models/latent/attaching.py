"""New indexers for latent attention: `dsa.attach` on DeepSeek-V3 and models of its form.

The indexer has DeepSeek-V3.2's shape: queries from the latent that the attention's own queries come from, RoPE in the
half-split layout on its first dims, as many of them as the attention turns and by the same angles, and nothing that is
always selected. So a trained model is one of `deepseek_v32` (`dsa.models.latent.export`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from dsa.config import DSAConfig
from dsa.models.families import Family, attention_name
from dsa.models.latent.attention import LatentAttention
from dsa.models.layer import LayerPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

INDEX_HEADS, INDEX_HEAD_DIM = 64, 128
"""DeepSeek-V3.2's."""


def default_config(config: PreTrainedConfig) -> DSAConfig:
    """The default for new indexers of latent attention: DeepSeek-V3.2's sizes and budget."""
    return DSAConfig(
        index_heads=INDEX_HEADS,
        index_head_dim=max(INDEX_HEAD_DIM, config.qk_rope_head_dim),
        index_rope_dim=config.qk_rope_head_dim,
        sinks=0,
        local=0,
        index_dtype="fp32",
    )


def resolved(given: DSAConfig, config: PreTrainedConfig) -> DSAConfig:
    """`given` with `index_rope_dim` filled in.

    Raises:
        ValueError: The indexer would rotate other dims than DeepSeek-V3.2's.
    """
    rotated = config.qk_rope_head_dim
    if given.index_head_dim < rotated:
        raise ValueError(
            f"index_head_dim must be at least {rotated}, the model's qk_rope_head_dim, whose angles the first index "
            f"dims carry; got {given.index_head_dim}"
        )
    if given.index_rope_dim not in (None, rotated):
        raise ValueError(
            f"index_rope_dim must be {rotated}, the model's qk_rope_head_dim, as in DeepSeek-V3.2; got "
            f"{given.index_rope_dim}; leave it out"
        )
    return given.replace(index_rope_dim=rotated)


def replace_attention(block: nn.Module, family: Family, plan: LayerPlan, config: PreTrainedConfig) -> LatentAttention:
    """Replaces a decoder layer's attention by a `LatentAttention` without an indexer, and returns it."""
    name = str(attention_name(block))
    ours = LatentAttention(getattr(block, name), plan, family.latent_layout(config))
    setattr(block, name, ours)
    return ours


def restore_attention(block: Any, name: str, original: nn.Module) -> None:
    """Puts a decoder layer's own attention module back, with the submodules that are in our module now.

    What replaced a submodule meanwhile (an adapter) belongs to the model.

    Args:
        block: The decoder layer.
        name: Where it keeps its attention.
        original: The module that was replaced.
    """
    ours = getattr(block, name)
    original._modules.update(ours._modules)
    setattr(block, name, original.train(ours.training))
