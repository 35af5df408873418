"""Running a model born with DSA sparse, and restoring it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_args

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dsa.config import DSAConfig, LayerConfig
from dsa.models import attention as dsa_attention
from dsa.models.attached import ACCELERATED, AttachReport, LayerReport
from dsa.models.attention import IMPLEMENTATION, WARNED, before_decoder
from dsa.models.decoder import decoder_of
from dsa.models.families import Family, attention_name, born_family_of
from dsa.models.latent.attaching import restore_attention
from dsa.models.latent.attention import LatentAttention
from dsa.models.latent.indexers import check_indexers, selection_sources
from dsa.models.layer import LayerPlan
from dsa.modules.latents import CacheDtype
from dsa.ops.packed_latents.types import row_bytes


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
    family: Family
    cache: CacheDtype
    overrides: dict[str, Any]
    originals: list[nn.Module]
    implementation: str
    handle: RemovableHandle


def accelerate(model: PreTrainedModel, *, cache: CacheDtype | str = "full", **overrides: Any) -> AccelerateReport:
    """Makes a model born with DSA (DeepSeek-V3.2, GLM-5) really sparse, in place; it computes what it did before.

    transformers scores all pairs of tokens at once and masks dense attention. Here the model's own indexers select
    through `index_topk`, attention reads the selected rows of the latent cache and nothing else, and the cache holds
    latents and index keys. Weights, their names and the model's class stay as they are; `restore` undoes everything.

    Args:
        model: A model of a family born with DSA (`dsa.models.families.BORN_WITH_DSA`).
        cache: How caches keep the latents. `"full"`: in the model's dtype, and results are the model's. `"fp8"`: as FP8
            rows, for DeepSeek's sizes 656 bytes a token and layer in place of 1,152 (bf16) or 2,304 (fp32), and
            results differ by their rounding. Without a cache nothing is rounded, and only there gradients pass.
        **overrides: Fields of `DSAConfig` to change: `top_k`, `sinks`, `local`, or `index_dtype="int8"` for index keys
            of a quarter of the size, `kv_dtype`. Without any the selection is the model's.

    Returns:
        What was replaced, layer by layer.

    Raises:
        TypeError: Not a transformers model.
        ValueError: `cache` is neither, the model's class has no row in the table, it is accelerated already, or its
            indexers and its configuration disagree: a missing or extra weight, another size, a shared layer before any
            full one.
    """
    family = born_family_of(model)
    name = type(model).__name__
    if is_accelerated(model):
        raise ValueError(f"{name} is accelerated already; call dsa.restore(model) first")
    if cache not in get_args(CacheDtype):
        raise ValueError(f"cache must be one of {', '.join(get_args(CacheDtype))}, got {cache!r}")
    kind = cast(CacheDtype, cache)
    check_indexers(model, family)
    shared = selection_sources(model, family)
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
    if kind == "fp8" and config.kv_dtype is not None:
        raise ValueError(f"kv_dtype: cache='fp8' keeps rows of bytes, so {config.kv_dtype!r} has no meaning; name one")
    implementation = model.config._attn_implementation
    dsa_attention.register()
    model.set_attn_implementation(IMPLEMENTATION)
    originals, rows, weights = [], [], 0
    layout = family.latent_layout(model.config)
    for layer, block in enumerate(family.blocks(model)):
        name = str(attention_name(block))
        original = getattr(block, name)
        originals.append(original)
        setattr(block, name, LatentAttention(original, LayerPlan(layer, config), layout, kind))
        source, budget = shared[layer], config.layer_top_k(layer)
        rows.append(LayerReport(layer, "sparse" if source is None else "shared", budget, config.local, source))
        if source is None:
            weights += sum(parameter.numel() for parameter in original.indexer.parameters())
    kept = _row_of_cache(model, kind)
    report = AccelerateReport(name, tuple(rows), True, weights, config, replaced=family.attention_class, cache=kept)
    handle = decoder_of(model).register_forward_pre_hook(partial(before_decoder, undo="dsa.restore"), with_kwargs=True)
    setattr(model, ACCELERATED, _Accelerated(report, family, kind, overrides, originals, implementation, handle))
    return report


def restore(model: PreTrainedModel) -> None:
    """Puts a model's own attention modules back, with the weights that the model has now.

    Raises:
        ValueError: The model is not accelerated.
    """
    state = _state(model)
    for layer, original in zip(state.family.blocks(model), state.originals):
        restore_attention(layer, str(attention_name(layer)), original)
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
    """What a cache keeps of a token in a layer, without its index key, for the report."""
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
