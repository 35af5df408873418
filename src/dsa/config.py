"""`DSAConfig`: what a model's sparse attention is made of, and its validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

INDEX_DTYPES = ("int8", "fp8", "fp32")
KV_DTYPES = ("fp32", "bf16", "fp16")

_NO_OTHER_FIELDS = {"extra": "forbid"}
"""For `dsa.runs.json_files`, which reads configurations out of files."""


@dataclass(frozen=True)
class LayerConfig:
    """What one layer does differently from the rest.

    Args:
        dense: Keep full attention in this layer; it gets no indexer.
        top_k: Tokens read per query in this layer. `None` takes the model's.
        local: Most recent tokens that this layer always reads. `None` takes the model's.
        share: Reuse the selection of this earlier layer; it gets no indexer (IndexShare, IndexCache).
        selections: How many selections this layer makes for each query. `None` takes the model's.
    """

    __pydantic_config__ = _NO_OTHER_FIELDS

    dense: bool = False
    top_k: int | None = None
    local: int | None = None
    share: int | None = None
    selections: int | str | None = None


@dataclass(frozen=True)
class DSAConfig:
    """Sizes and budget of DeepSeek Sparse Attention on one model.

    Args:
        top_k: Tokens each query reads, the always-read sinks and local window included.
        index_heads: Heads of the lightning indexer (`Hi`).
        index_head_dim: Size of one indexer head (`Di`). A power of two lets int8 keys be Hadamard-rotated.
        index_rope_dim: How many of the first `Di` dims carry RoPE. `None` means a quarter: the other dims can
            tell what a token is however far away it is. Ignored on models and layers without RoPE.
        sinks: The first visible tokens, always read.
        local: The last visible tokens, always read.
        selections: How many selections of `top_k` tokens each query makes: 1 for all heads, `"kv"` for one for each KV
            head, or a number that divides the KV heads. As many rows of K and V are read; only selecting is done more
            often, and what is selected fits the heads better.
        index_dtype: Storage of the index keys: `"int8"` or `"fp8"` (e4m3), with one scale per token, or `"fp32"`.
        kv_dtype: How caches keep K and V, or the rows of latent attention: `"fp32"`, `"bf16"` or `"fp16"`, but never
            wider than the model computes; `None` as it computes.
        layers: Exceptions by layer number.
        dense_shortcut: Run dense attention, without scoring, while no query sees more than `top_k` tokens.
            The result is the same; `False` forces the sparse path, which tests use.

    Raises:
        ValueError: A size is out of range, or the always-read tokens exceed a layer's budget.
    """

    __pydantic_config__ = _NO_OTHER_FIELDS

    top_k: int = 2048
    index_heads: int = 4
    index_head_dim: int = 32
    index_rope_dim: int | None = None
    sinks: int = 4
    local: int = 256
    selections: int | str = 1
    index_dtype: str = "int8"
    kv_dtype: str | None = None
    layers: Mapping[int, LayerConfig] = field(default_factory=dict)
    dense_shortcut: bool = True

    def __post_init__(self) -> None:
        for name in ("top_k", "index_heads", "index_head_dim"):
            _require_int(name, getattr(self, name), minimum=1)
        for name in ("sinks", "local"):
            _require_int(name, getattr(self, name), minimum=0)
        if self.index_rope_dim is not None:
            _require_int("index_rope_dim", self.index_rope_dim, minimum=0)
            if self.index_rope_dim > self.index_head_dim or self.index_rope_dim % 2:
                raise ValueError(
                    f"index_rope_dim must be even and at most index_head_dim ({self.index_head_dim}), "
                    f"got {self.index_rope_dim}"
                )
        _require_selections("selections", self.selections)
        if self.index_dtype not in INDEX_DTYPES:
            raise ValueError(f"index_dtype must be one of {INDEX_DTYPES}, got {self.index_dtype!r}")
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise ValueError(f"kv_dtype must be one of {KV_DTYPES}, or None, got {self.kv_dtype!r}")
        layers = {int(number): _as_layer_config(number, layer) for number, layer in self.layers.items()}
        object.__setattr__(self, "layers", dict(sorted(layers.items())))
        self._check_budget("top_k", self.top_k, self.local)
        for number, layer in layers.items():
            self._check_layer(number, layer)

    def _check_budget(self, name: str, top_k: int, local: int) -> None:
        if top_k < self.sinks + local:
            raise ValueError(
                f"{name} must be at least sinks + local, which are always read: got {name}={top_k}, "
                f"sinks={self.sinks}, local={local}; raise {name} to {self.sinks + local} or lower local"
            )

    def _check_layer(self, number: int, layer: LayerConfig) -> None:
        name = f"layers[{number}]"
        if number < 0:
            raise ValueError(f"layers: a layer number must not be negative, got {number}")
        if layer.share is not None:
            others = (layer.top_k, layer.local, layer.selections)
            if layer.dense or any(other is not None for other in others):
                raise ValueError(
                    f"{name}: share={layer.share} reuses another layer's selection as it is; "
                    "it cannot be combined with dense, top_k, local or selections"
                )
            source = self.layers.get(layer.share, LayerConfig())
            if not 0 <= layer.share < number or source.dense or source.share is not None:
                raise ValueError(f"{name}: share must name an earlier layer that selects for itself, got {layer.share}")
        if layer.top_k is not None:
            _require_int(f"{name}.top_k", layer.top_k, minimum=1)
        if layer.local is not None:
            _require_int(f"{name}.local", layer.local, minimum=0)
        if layer.selections is not None:
            _require_selections(f"{name}.selections", layer.selections)
        if not layer.dense and layer.share is None:
            self._check_budget(
                f"{name}.top_k" if layer.top_k is not None else "top_k",
                self.layer_top_k(number),
                self.layer_local(number),
            )

    @property
    def rope_dim(self) -> int:
        """How many of the first index dims carry RoPE."""
        if self.index_rope_dim is not None:
            return self.index_rope_dim
        return min(max(2, self.index_head_dim // 8 * 2), self.index_head_dim // 2 * 2)

    def is_dense(self, layer: int) -> bool:
        """Whether this layer keeps full attention."""
        return self.layers.get(layer, LayerConfig()).dense

    def shared_with(self, layer: int) -> int | None:
        """The layer whose selection this layer reuses, if any."""
        return self.layers.get(layer, LayerConfig()).share

    def has_indexer(self, layer: int) -> bool:
        """Whether this layer selects for itself."""
        return not self.is_dense(layer) and self.shared_with(layer) is None

    def layer_top_k(self, layer: int) -> int:
        """Tokens each query reads in this layer."""
        source = self.shared_with(layer)
        own = self.layers.get(layer if source is None else source, LayerConfig()).top_k
        return self.top_k if own is None else own

    def layer_local(self, layer: int) -> int:
        """Most recent tokens this layer always reads."""
        source = self.shared_with(layer)
        own = self.layers.get(layer if source is None else source, LayerConfig()).local
        return self.local if own is None else own

    def layer_selections(self, layer: int, groups: int) -> int:
        """How many selections this layer reads by.

        Args:
            layer: Layer number.
            groups: KV heads of the layer.

        Raises:
            ValueError: They are not a multiple of the selections.
        """
        source = self.shared_with(layer)
        own = self.layers.get(layer if source is None else source, LayerConfig()).selections
        wanted = self.selections if own is None else own
        if wanted == "kv":
            return groups
        assert isinstance(wanted, int)
        if groups % wanted:
            raise ValueError(
                f"selections must divide the KV heads of layer {layer}: got {wanted} for {groups}; use 1, 'kv' for one "
                "for each KV head, or a divisor"
            )
        return wanted

    def replace(self, **changes: Any) -> DSAConfig:
        """A copy with some fields changed, validated again.

        A new `top_k` or `local` is meant for the whole model: the layers' own give way to it, unless `layers` is
        among the changes.

        Raises:
            ValueError: An unknown field, or a value out of range.
        """
        _check_fields(changes)
        budgets: dict[str, Any] = {name: None for name in ("top_k", "local") if name in changes}
        if budgets and "layers" not in changes:
            layers = {number: dataclasses.replace(layer, **budgets) for number, layer in self.layers.items()}
            changes["layers"] = {number: layer for number, layer in layers.items() if layer != LayerConfig()}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the inverse of `from_dict`."""
        plain = dataclasses.asdict(self)
        defaults = LayerConfig()
        plain["layers"] = {
            str(number): {key: value for key, value in layer.items() if value != getattr(defaults, key)}
            for number, layer in plain["layers"].items()
        }
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> DSAConfig:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: An unknown field, or a value out of range.
        """
        _check_fields(plain)
        return cls(**plain)


def _check_fields(given: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(DSAConfig)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"DSAConfig has no field {unknown[0]!r}; it has {', '.join(known)}")


def _as_layer_config(number: int | str, layer: LayerConfig | Mapping[str, Any]) -> LayerConfig:
    if isinstance(layer, LayerConfig):
        return layer
    known = {f.name for f in dataclasses.fields(LayerConfig)}
    if not isinstance(layer, Mapping) or set(layer) - known:
        raise ValueError(
            f"layers[{number}] must be a LayerConfig or a mapping with keys out of {sorted(known)}, got {layer!r}"
        )
    return LayerConfig(**layer)


def _require_int(name: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _require_selections(name: str, value: object) -> None:
    if value == "kv":
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{name} must be a whole number of at least 1, or 'kv' for one for each KV head, got {value!r}"
        )
