"""The indexers that a model was born with: which layers have one, and whether its weights are what they should be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsa.models.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def selection_sources(model: PreTrainedModel, family: Family) -> list[int | None]:
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


def check_indexers(model: PreTrainedModel, family: Family) -> None:
    """Checks every layer's indexer against the configuration.

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
    for layer, (block, source) in enumerate(zip(family.blocks(model), selection_sources(model, family))):
        attention = block.self_attn
        name = f"layers.{layer}.self_attn.indexer"
        indexer = getattr(attention, "indexer", None)
        if type(attention).__name__ != family.attention_class:
            raise ValueError(
                f"layers.{layer}.self_attn of {type(model).__name__} is a {type(attention).__name__}, expected "
                f"{family.attention_class}: it has been replaced already; restore it first"
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
