"""Everything that `dsa cost` says about a model, as one dictionary of plain JSON types."""

from __future__ import annotations

from typing import Any

from dsa.config import DSAConfig, LayerConfig
from dsa.cost.crossing import crossing_point
from dsa.cost.pairs import Pairs
from dsa.cost.shape import LatentAttention, ModelShape
from dsa.cost.work import (
    QUERIES_PER_READ,
    Parts,
    Storage,
    budgets,
    decode_work,
    memory,
    prefill_work,
    request_work,
    selecting_layers,
    total,
)

Variants = dict[str, DSAConfig | None]
"""What is compared: `dense`, `dsa`, and `shared` where layers share their selections."""


def config_for(
    shape: ModelShape,
    own: DSAConfig | None,
    *,
    top_k: int | None = None,
    share: int | None = None,
    index_heads: int | None = None,
    index_head_dim: int | None = None,
    index_dtype: str | None = None,
) -> DSAConfig:
    """The DSA to count: a model's own or the defaults, with what the user changed.

    Tokens that are always read count towards `K` and change no cost, so that none are kept here.

    Args:
        shape: The model.
        own: What it comes with, if anything.
        top_k: Tokens each query reads, in every layer.
        share: Let every first of that many selecting layers select for the others.
        index_heads: `Hi`.
        index_head_dim: `Di`.
        index_dtype: How index keys are stored: `"int8"`, `"fp8"` or `"fp32"`.

    Raises:
        ValueError: A value out of range.
    """
    given = {
        "top_k": top_k,
        "index_heads": index_heads,
        "index_head_dim": index_head_dim,
        "index_dtype": index_dtype,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    config = (own or DSAConfig()).replace(sinks=0, local=0, index_rope_dim=None, **changes)
    if share is None:
        return config
    if share < 1:
        raise ValueError(f"share must be at least 1, got {share}: how many layers read one selection")
    layers = dict(config.layers)
    reading = [number for number in shape.full_layers if not config.is_dense(number)]
    for place, number in enumerate(reading):
        source = reading[place - place % share]
        own_top_k = config.layers.get(number, LayerConfig()).top_k
        layers[number] = LayerConfig(top_k=own_top_k) if source == number else LayerConfig(share=source)
    return config.replace(layers={number: layer for number, layer in layers.items() if layer != LayerConfig()})


def variants_of(config: DSAConfig) -> Variants:
    """What to compare: where layers share, what they would cost selecting for themselves as well."""
    sharing = [number for number in config.layers if config.shared_with(number) is not None]
    if not sharing:
        return {"dense": None, "dsa": config}
    layers = {**config.layers, **{number: LayerConfig(top_k=config.layer_top_k(number)) for number in sharing}}
    return {"dense": None, "dsa": config.replace(layers=layers), "shared": config}


def model_report(
    shape: ModelShape, config: DSAConfig, tokens: int, decoded: int = 256, storage: Storage | None = None
) -> dict[str, Any]:
    """Pairs, work of one decoded token, of the prompt and of the request, memory and crossing points.

    Args:
        shape: The model.
        config: Its DSA.
        tokens: The prompt's length, and what the decoded token sees.
        decoded: Tokens decoded after the prompt.
        storage: Bytes of a number.

    Raises:
        ValueError: A count out of range.
    """
    storage = storage or Storage()
    variants = variants_of(config)
    return {
        **Pairs(tokens, config.top_k).to_json(),
        "model": _model_json(shape, config),
        "config": config.to_dict(),
        "decoded": decoded,
        "weight_bytes": storage.weights,
        "cache_bytes": storage.cache,
        "fp8_rows": storage.fp8_rows,
        "assumptions": assumptions(shape, config, storage),
        "variants": {
            name: {
                "token": _parts_json(decode_work(shape, each, tokens, tokens, storage)),
                "prompt": _parts_json(prefill_work(shape, each, tokens, storage)),
                "request": _parts_json(request_work(shape, each, tokens, decoded, storage)),
                "memory": memory(shape, each, tokens + decoded, storage).to_json(),
            }
            for name, each in variants.items()
        },
        "crossing": {name: crossings(shape, each, storage) for name, each in variants.items() if each is not None},
    }


def crossings(shape: ModelShape, config: DSAConfig, storage: Storage) -> dict[str, int | None]:
    """From which length on DSA needs less than dense attention; `None` where it never does."""
    edges = budgets(shape, [config])

    def saving(length: int, phase: str, what: str) -> float:
        def cost(each: DSAConfig | None) -> float:
            if phase == "token":
                return float(getattr(total(decode_work(shape, each, length, length, storage)), what))
            return float(getattr(total(prefill_work(shape, each, length, storage)), what))

        return cost(None) - cost(config)

    wanted = (("token", "multiply_adds"), ("token", "bytes"), ("prompt", "multiply_adds"))
    return {
        f"{phase}_{what}": crossing_point(lambda length, p=phase, w=what: saving(length, p, w), edges)  # type: ignore[misc]
        for phase, what in wanted
    }


def assumptions(shape: ModelShape, config: DSAConfig, storage: Storage) -> list[str]:
    """What the figures rest on, in words."""
    said = [
        "multiply-adds are those of matrix products and index scores; norms, RoPE, softmax, activations are left out",
        "bytes are weights and caches; a decoded token reads every active weight by itself (batch of 1)",
        f"a prompt is one forward: weights are read once, the head runs once, {QUERIES_PER_READ} queries share a read "
        "of what all of them see, selections are read by each query",
        "nothing is scored while a query sees at most K tokens; its index key is stored all the same",
    ]
    latent = next((each.attention for each in shape.layers if isinstance(each.attention, LatentAttention)), None)
    if latent is not None:
        said.append(
            "latent attention runs expanded in dense prefill, H (plain + rope + value) a pair, and absorbed in "
            "decoding and over selections, H (2 latent + rope) a pair"
        )
        kind = "an FP8 row" if storage.fp8_rows else "a row"
        key = shape.indexer(0, config).key_bytes
        said.append(
            f"a cached token takes {kind} of {storage.row(latent):,.0f} bytes a layer, and an {config.index_dtype} "
            f"index key of {key:,} where the layer selects"
        )
    if shape.trained_dsa is None:
        said.append("the indexers' queries come from the layer's hidden states")
    return said


def _model_json(shape: ModelShape, config: DSAConfig) -> dict[str, Any]:
    return {
        "name": shape.name,
        "model_type": shape.model_type,
        "layers": len(shape.layers),
        "full_attention_layers": len(shape.full_layers),
        "selecting_layers": len(selecting_layers(shape, config)),
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "positions": shape.positions,
        "trained_with_dsa": shape.trained_dsa is not None,
    }


def _parts_json(parts: Parts) -> dict[str, dict[str, float]]:
    return {**{part: work.to_json() for part, work in parts.items()}, "total": total(parts).to_json()}
