"""A trained model with latent attention, written as a DeepSeek-V3.2.

DeepSeek-V3 with a lightning indexer on every layer is DeepSeek-V3.2: the weights have the same names, and plain
transformers loads them as `DeepseekV32ForCausalLM`, without this package.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsa.config import DSAConfig
from dsa.models.attached import config_of
from dsa.models.families import family_of
from dsa.runs.files import fill_folder

if TYPE_CHECKING:
    from transformers import DeepseekV32Config, PreTrainedConfig, PreTrainedModel

EXPORTABLE = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu")
"""Families whose decoder layers are DeepSeek-V3.2's, but for what `_check_model` looks at."""

NOT_TAKEN_OVER = frozenset({"layer_types", "architectures", "transformers_version", "auto_map", "rope_interleave"})
"""Fields that name the kind of model, which is now DeepSeek-V3.2."""


def export_deepseek_v32(
    model: PreTrainedModel, directory: str | Path, *, tokenizer: Any = None, max_shard_size: str = "5GB"
) -> Path:
    """Writes an attached model with latent attention as a DeepSeek-V3.2, for plain transformers.

    The folder holds `config.json` and safetensors that `AutoModelForCausalLM.from_pretrained` loads as
    `DeepseekV32ForCausalLM` in processes without this package; `dsa.accelerate` and the commands run it sparse. The
    model itself stays as it is. Multi-token prediction modules, which transformers does not load, are left out.

    Args:
        model: DeepSeek-V3, GLM-4.7-Flash (`glm4_moe_lite`), Youtu-LLM or DeepSeek-V2 without experts, attached.
        directory: The folder to write; created where it is missing.
        tokenizer: Saved next to the weights.
        max_shard_size: Largest file of weights, as `save_pretrained` takes it.

    Returns:
        The folder.

    Raises:
        ValueError: The model is not attached, or DeepSeek-V3.2 has no place for something that it does: the message
            names it.
        OSError: The folder cannot be written.
    """
    from transformers import DeepseekV32ForCausalLM

    config = config_of(model)
    _check_model(model)
    _check_selection(type(model).__name__, config, model.config.num_hidden_layers)
    new = deepseek_v32_config(model.config, config)
    weights = _weights(model)
    with torch.device("meta"):
        written = DeepseekV32ForCausalLM(new)
    missing = sorted(set(written.state_dict()) ^ set(weights))
    if missing:
        raise ValueError(
            f"{type(model).__name__} has other weights than DeepSeek-V3.2, {missing[0]} first ({len(missing)} in all); "
            "merge adapters, and put replaced modules back"
        )
    written.load_state_dict(weights, assign=True)
    written.generation_config = model.generation_config

    def save(part: Path) -> None:
        written.save_pretrained(part, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)

    path = Path(directory)
    fill_folder(path, save, "out")
    return path


def deepseek_v32_config(config: PreTrainedConfig, indexers: DSAConfig) -> DeepseekV32Config:
    """DeepSeek-V3.2's configuration with the sizes of a model and of its indexers.

    Args:
        config: Of a model with latent attention.
        indexers: What the model is attached with.
    """
    from transformers import DeepseekV32Config

    known = {field.name for field in dataclasses.fields(DeepseekV32Config)}
    own = config.to_dict()
    sizes = {name: value for name, value in own.items() if name in known and name not in NOT_TAKEN_OVER}
    if "n_routed_experts" not in own:
        sizes["mlp_layer_types"] = ["dense"] * config.num_hidden_layers
    return DeepseekV32Config(
        **sizes,
        index_topk=indexers.top_k,
        index_n_heads=indexers.index_heads,
        index_head_dim=indexers.index_head_dim,
    )


def _check_model(model: PreTrainedModel) -> None:
    """Refuses a model that does something DeepSeek-V3.2 does not."""
    name, config = type(model).__name__, model.config
    family = family_of(model)
    if family.model_type not in EXPORTABLE:
        raise ValueError(
            f"{name} ({family.model_type}) cannot be written as a DeepSeek-V3.2: that needs latent attention and its "
            f"kind of decoder layer, as {', '.join(EXPORTABLE)} have them; model.save_pretrained(directory) saves it "
            "with its indexers"
        )
    instead = "model.save_pretrained(directory) saves it with its indexers, to be loaded with this package"
    if config.q_lora_rank is None:
        raise ValueError(
            f"{name} has no query latent (q_lora_rank is None), out of which DeepSeek-V3.2 makes queries and index "
            f"queries; {instead}"
        )
    routed = any(hasattr(getattr(block, "mlp", None), "gate") for block in family.blocks(model))
    if family.model_type == "deepseek_v2" and routed:
        raise ValueError(
            f"{name} scores its experts by a softmax, DeepSeek-V3.2 by sigmoids: its weights would mean something "
            f"else there; {instead}"
        )


def _check_selection(name: str, config: DSAConfig, layers: int) -> None:
    """Refuses a selection that DeepSeek-V3.2's own indexer would not make."""
    retrain = "attach and train it without"
    if config.sinks or config.local:
        raise ValueError(
            f"{name} always reads {config.sinks} first and {config.local} last tokens; DeepSeek-V3.2 has no such "
            f"tokens: {retrain} (sinks=0, local=0)"
        )
    for layer in range(layers):
        if not config.has_indexer(layer):
            what = "is dense" if config.is_dense(layer) else f"shares the selection of {config.shared_with(layer)}"
            raise ValueError(
                f"layer {layer} of {name} {what}; in DeepSeek-V3.2 every layer selects for itself: {retrain}"
            )
        if config.layer_top_k(layer) != config.top_k or config.layer_local(layer):
            raise ValueError(
                f"layer {layer} of {name} has a budget of its own (top_k={config.layer_top_k(layer)}, "
                f"local={config.layer_local(layer)}); DeepSeek-V3.2 has one for all: {retrain}"
            )


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's weights, in the order of dims that DeepSeek-V3.2's RoPE pairs."""
    weights = dict(model.state_dict())
    config = model.config
    if family_of(model).latent_layout(config).attention_rope == "interleaved":
        return weights
    rotated = config.qk_rope_head_dim
    # Dims i and i + R/2 become 2i and 2i + 1, in queries and keys alike: their products stay.
    order = torch.arange(rotated).view(2, -1).T.flatten()
    for name, weight in weights.items():
        if ".q_b_proj." in name:
            heads = weight.unflatten(0, (config.num_attention_heads, -1)).clone()
            heads[:, -rotated:] = heads[:, -rotated:][:, order]
            weights[name] = heads.flatten(0, 1)
        elif ".kv_a_proj_with_mqa." in name:
            rows = weight.clone()
            rows[-rotated:] = rows[-rotated:][order]
            weights[name] = rows
    return weights
