"""Running a model born with DSA truly sparse, and giving it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast, get_args

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dsa.config import DSAConfig, LayerConfig
from dsa.models import attention as dsa_attention
from dsa.models.attachment import AttachReport, LayerReport
from dsa.models.attention import IMPLEMENTATION, WARNED, check_positions
from dsa.models.context import DSAContext
from dsa.models.decoder import decoder_layers, decoder_of
from dsa.models.layer import LayerPlan
from dsa.models.native.attaching import give_back
from dsa.models.native.attention import LatentAttention
from dsa.models.native.families import check_indexers, native_family_of, sources
from dsa.modules.latents import CacheDtype
from dsa.ops.packed_latents.types import row_bytes

ACCELERATED = "dsa_accelerated"
"""Attribute of an accelerated model that says so."""


@dataclass(frozen=True)
class AccelerateReport(AttachReport):
    """What `accelerate` replaced, layer by layer; prints as a short table.

    Args:
        replaced: Class of the attention modules that were replaced.
        cache: How a cache keeps a token's row.
    """

    replaced: str = ""
    cache: str = ""

    def __str__(self) -> str:
        first = (
            f"{self.model}: {len(self.layers)} x {self.replaced} replaced by {LatentAttention.__name__}, with the "
            f"model's own {self.count('sparse')} indexers ({self.parameters:,} weights); a cache keeps {self.cache}"
        )
        return "\n".join([first, *super().__str__().splitlines()[1:]])


@dataclass
class _Accelerated:
    """What `restore` needs to undo everything; kept on the model as `dsa_accelerated`."""

    report: AccelerateReport
    cache: CacheDtype
    overrides: dict[str, Any]
    originals: list[nn.Module]
    implementation: str
    handle: RemovableHandle


def accelerate(model: PreTrainedModel, *, cache: CacheDtype | str = "full", **overrides: Any) -> AccelerateReport:
    """Makes a model born with DSA (DeepSeek-V3.2, GLM-5) compute what it computes, truly sparse, in place.

    transformers scores all pairs of tokens at once and masks dense attention. Here the model's own indexers select
    through `index_topk`, attention reads the selected rows of the latent cache and nothing else, and the cache holds
    latents and index keys. Weights, their names and the model's class stay as they are; `restore` undoes everything.

    Args:
        model: A model out of `dsa.models.native.families`.
        cache: How caches keep the latents. `"full"`: in the model's dtype, and results are the model's. `"fp8"`: as FP8
            rows, for DeepSeek's sizes 656 bytes a token and layer in place of 1,152 (bf16) or 2,304 (fp32), and
            results differ by their rounding. Without a cache nothing is rounded, and only there gradients pass.
        **overrides: Fields of `DSAConfig` to change: `top_k`, `sinks`, `local`, or `index_dtype="int8"` for index keys
            of a quarter of the size. Without any the selection is the model's.

    Returns:
        What was replaced, layer by layer.

    Raises:
        TypeError: Not a transformers model.
        ValueError: `cache` is neither, the model's class has no row in the table, it is accelerated already, or its
            indexers and its configuration disagree: a missing or extra weight, another size, a shared layer before any
            full one.
    """
    family = native_family_of(model)
    name = type(model).__name__
    if is_accelerated(model):
        raise ValueError(f"{name} is accelerated already; call dsa.restore(model) first")
    if cache not in get_args(CacheDtype):
        raise ValueError(f"cache must be one of {', '.join(get_args(CacheDtype))}, got {cache!r}")
    kind = cast(CacheDtype, cache)
    check_indexers(model, family)
    shared = sources(model, family)
    config = DSAConfig(
        top_k=model.config.index_topk,
        index_heads=model.config.index_n_heads,
        index_head_dim=model.config.index_head_dim,
        index_rope_dim=model.config.qk_rope_head_dim,
        sinks=0,
        local=0,
        index_dtype="fp32",
        layers={layer: LayerConfig(share=source) for layer, source in enumerate(shared) if source is not None},
    ).replace(**overrides)
    implementation = model.config._attn_implementation
    dsa_attention.register()
    model.set_attn_implementation(IMPLEMENTATION)
    originals, rows, weights = [], [], 0
    for layer, block in enumerate(decoder_layers(model)):
        original = block.self_attn
        originals.append(original)
        block.self_attn = LatentAttention(original, LayerPlan(layer, config), family, kind)
        source, budget = shared[layer], config.layer_top_k(layer)
        rows.append(LayerReport(layer, "sparse" if source is None else "shared", budget, config.local, source))
        if source is None:
            weights += sum(parameter.numel() for parameter in original.indexer.parameters())
    kept = _row_of_cache(model, kind)
    report = AccelerateReport(name, tuple(rows), True, weights, config, replaced=family.attention, cache=kept)
    handle = decoder_of(model).register_forward_pre_hook(_before_decoder, with_kwargs=True)
    setattr(model, ACCELERATED, _Accelerated(report, kind, overrides, originals, implementation, handle))
    return report


def restore(model: PreTrainedModel) -> None:
    """Gives a model its own attention modules back; their weights are those that the model has now.

    Raises:
        ValueError: The model is not accelerated.
    """
    state = _state(model)
    for layer, original in zip(decoder_layers(model), state.originals):
        give_back(layer, "self_attn", original)
    state.handle.remove()
    vars(decoder_of(model)).pop(WARNED, None)
    model.set_attn_implementation(state.implementation)
    delattr(model, ACCELERATED)


@contextmanager
def accelerated(
    model: PreTrainedModel, cache: CacheDtype | str | None = None, **overrides: Any
) -> Iterator[AccelerateReport]:
    """`accelerate` while the context is open; afterwards the model is as it was given, accelerated or not.

    Args:
        model: As in `accelerate`. What it is accelerated with already holds where nothing else is said.
        cache: As in `accelerate`; `None` keeps the model's own, or `"full"`.
        **overrides: As in `accelerate`.

    Raises:
        ValueError: As `accelerate`.
    """
    before: _Accelerated | None = getattr(model, ACCELERATED, None)
    if before is not None:
        restore(model)
    kept: CacheDtype = "full" if before is None else before.cache
    fields = overrides if before is None else {**before.overrides, **overrides}
    try:
        yield accelerate(model, cache=cache or kept, **fields)
    finally:
        if is_accelerated(model):
            restore(model)
        if before is not None:
            accelerate(model, cache=before.cache, **before.overrides)


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` was called on this model and not undone."""
    return hasattr(model, ACCELERATED)


def accelerate_report_of(model: PreTrainedModel) -> AccelerateReport:
    """What `accelerate` returned for this model. Raises `ValueError` where it was not called."""
    return _state(model).report


def cache_of(model: PreTrainedModel) -> CacheDtype:
    """How this model's caches keep what attention reads: `"full"`, unless `accelerate` was told otherwise."""
    return _state(model).cache if is_accelerated(model) else "full"


def _row_of_cache(model: PreTrainedModel, cache: CacheDtype) -> str:
    """What a cache keeps of a token in a layer, beside its index key, for the report."""
    latent_dim, rope_dim = model.config.kv_lora_rank, model.config.qk_rope_head_dim
    plain = (latent_dim + rope_dim) * model.dtype.itemsize
    name = str(model.dtype).removeprefix("torch.")
    if cache == "full":
        return f"rows of {plain:,} bytes ({name})"
    return f"FP8 rows of {row_bytes(latent_dim, rope_dim):,} bytes ({plain:,} as {name})"


def _state(model: PreTrainedModel) -> _Accelerated:
    state = getattr(model, ACCELERATED, None)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not accelerated; call dsa.accelerate(model) first")
    return state


def _before_decoder(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the decoder: checks that the call can be served and makes its context."""
    if module.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"attn_implementation was changed to {module.config._attn_implementation!r} while the model is "
            f"accelerated; call dsa.restore(model) first, or set it back to {IMPLEMENTATION!r}"
        )
    if kwargs.get("output_attentions") or module.config.output_attentions:
        raise ValueError(
            "output_attentions: sparse attention keeps no weights; call dsa.restore(model) first, or watch the layers "
            "with DSAContext(observer=...)"
        )
    check_positions(module, args, kwargs)
    if kwargs.get("dsa_context") is None:
        kwargs = {**kwargs, "dsa_context": DSAContext()}
    return args, kwargs
