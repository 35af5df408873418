"""Weights of a model in 4, 8 or 16 bits, in place of what they were loaded in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from dsa.models.packed import empty_like, put, remember
from dsa.modules.packed_linear import BF16, PackedEmbedding, PackedLinear, PackedMatrix
from dsa.ops import native_support

Form = Literal["int8", "int4", "bf16", "fp32"]

_FORMATS = {"int8": ("Q8_0", "Q8_0"), "int4": ("Q4_1", "Q8_0"), "bf16": (BF16, BF16)}
"""By form, the format of a layer, and of the head and the embedding, whose rounding costs more."""

_LEFT = ("gate", "router", "shared_expert_gate", "kv_b_proj")
"""Names of layers that stay as they are: what chooses experts, and what latent attention multiplies with otherwise."""


@dataclass(frozen=True)
class PackReport:
    """What `pack_weights` did.

    Args:
        form: What was asked for; `blocks` for a file's own.
        formats: By format, how many layers are stored in it now.
        bytes_before: Of the weights of linear layers and embeddings, before.
        bytes_after: The same, now.
        left: Names of linear layers and embeddings that stay as they are.
    """

    form: str
    formats: Mapping[str, int]
    bytes_before: int
    bytes_after: int
    left: tuple[str, ...]

    def __str__(self) -> str:
        stored = ", ".join(f"{count} in {name}" for name, count in self.formats.items())
        said = f"weights {self.form}: {stored or 'no layers packed'}"
        said += f"; {self.bytes_before / 1e6:,.0f} MB before, {self.bytes_after / 1e6:,.0f} MB now"
        if self.left:
            said += f"; {len(self.left)} left as they are ({self.left[0]}{', ...' if len(self.left) > 1 else ''})"
        return said


def pack_weights(model: PreTrainedModel, form: Form) -> PackReport:
    """Stores the weights of linear layers, embedding and head in fewer bits, or widens them again.

    In place, before or after `dsa.attach`, as often as wanted. `int8` is Q8_0: blocks of 32 weights with a scale.
    `int4` is Q4_1, with head and embedding in Q8_0. Both are multiplied with activations in eight bits
    (`ops/packed_linear/README.md`). `bf16` is multiplied by torch. `fp32` makes torch's layers of whatever is packed:
    their numbers are those that the packed weights stood for. Norms, biases, indexers, K and V stay as they are; so
    do layers that choose experts, layers of a class of their own, and the experts of models that keep them in one
    tensor.

    Args:
        model: On the CPU.
        form: `int8`, `int4`, `bf16` or `fp32`.

    Returns:
        Which layers are stored how, and how many bytes they take.

    Raises:
        ValueError: Another form, a model elsewhere, numbers that have no place in a block, or a processor without
            instructions for bf16. Nothing is changed then.
    """
    if form not in get_args(Form):
        raise ValueError(f"weights: expected one of {', '.join(get_args(Form))}, got {form!r}")
    found = dict(_layers(model))
    before = _bytes(found)
    _check(form, found)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if form == "fp32":
        _widen(model, found, _tied(*ends))
    else:
        _pack(model, found, _FORMATS[form], ends)
    remember(model)
    return report_on(model, form, before)


def why_auto() -> str:
    """Why `auto` leaves weights as they are stored, and takes the default model's own blocks.

    The figures are of `benchmarks/packed_products.py --only quality`: perplexity over that in fp32, four texts of 4,096
    tokens, 1.0044 (95 % interval 1.0029 to 1.0059) and 1.0026 (1.0014 to 1.0038).
    """
    gap = native_support.gap()
    if gap is not None:
        return f"packed weights are slow without the CPU kernels: {gap}"
    return "int8 raised perplexity by 0.4 %, so it has to be asked for; the default model's own blocks by 0.3 %"


def report_on(model: PreTrainedModel, form: str, before: int) -> PackReport:
    """What is packed now.

    Args:
        model: The model.
        form: What was asked for.
        before: Bytes of the weights before.
    """
    layers = dict(_layers(model))
    formats = Counter(module.format for module in layers.values() if isinstance(module, PackedMatrix))
    left = tuple(name for name, module in layers.items() if not isinstance(module, PackedMatrix)) if formats else ()
    return PackReport(form, dict(formats), before, _bytes(layers), left)


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and embeddings, packed or not, without those of indexers and adapters."""
    for name, module in model.named_modules():
        if ".indexer." in f".{name}." or ".lora_" in name:
            continue
        if isinstance(module, PackedMatrix | nn.Linear | nn.Embedding):
            yield name, module


def weight_bytes(model: PreTrainedModel) -> int:
    """Of the weights of linear layers and embeddings, however they are stored."""
    return _bytes(dict(_layers(model)))


def _bytes(layers: Mapping[str, nn.Module]) -> int:
    """Of the weights, tied ones counted once."""
    tensors = [m.source.blocks if isinstance(m, PackedMatrix) else m.weight for m in layers.values()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)}.values())


def _is_packable(name: str, module: nn.Module) -> bool:
    # A subclass computes something else besides: it stays as it is.
    return type(module) in (nn.Linear, nn.Embedding) and name.rpartition(".")[2] not in _LEFT


def _check(form: str, layers: Mapping[str, nn.Module]) -> None:
    for name, module in layers.items():
        if hasattr(module, "_hf_hook"):
            raise ValueError(f"weights: {name} is offloaded, expected a model in memory; load it without device_map")
        if isinstance(module, PackedMatrix):
            continue
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        if not weight.is_cpu:
            raise ValueError(f"weights: {name} is on {weight.device}, and packed weights run on the CPU; move it there")
        if form in ("int8", "int4") and _is_packable(name, module):
            largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
            if not largest <= torch.finfo(torch.float16).max:
                raise ValueError(
                    f"weights: {name} has a weight of {largest:g}, and blocks hold finite numbers up to 65504; "
                    "take fp32 or bf16"
                )
    if form == "bf16" and not has_bf16():
        raise ValueError(
            "weights: this processor has no instructions for bf16 (AVX512-BF16, AMX or ARMv8.6), without which it is "
            "slower than fp32; take int8"
        )


def has_bf16() -> bool:
    """Whether this processor multiplies bf16, as far as this torch says."""
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(has.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _tied(embedding: Any, head: Any) -> bool:
    if isinstance(head, PackedMatrix):
        return head.source is embedding
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", embedding)


def _pack(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], formats: tuple[str, str], ends: tuple[Any, Any]
) -> None:
    embedding, head = ends
    tied = _tied(embedding, head)
    # Tied weights are packed together or not at all.
    left = ends if tied and not all(isinstance(m, PackedMatrix) or _is_packable("", m) for m in ends) else ()
    # The embedding first, because a tied head takes its blocks.
    for name, module in sorted(layers.items(), key=lambda each: each[1] is not embedding):
        if module in left or not (isinstance(module, PackedMatrix) or _is_packable(name, module)):
            continue
        format = formats[1] if module in ends else formats[0]
        shared = model.get_input_embeddings() if tied and module is head else None
        if isinstance(module, PackedMatrix):
            if module.format == format and (shared is None or module.source is shared):
                continue
            module = _plain(module, module.numbers() if shared is None else None)
        made = empty_like(module, format, shared if isinstance(shared, PackedMatrix) else None)
        if shared is None:
            assert isinstance(module.weight, torch.Tensor)
            made.fill(module.weight)
        put(model, name, made)


def _plain(module: PackedMatrix, numbers: torch.Tensor | None) -> nn.Module:
    """torch's layer of a packed one's sizes, bias and dtype; without numbers its weight has none."""
    with torch.device("meta"):
        if isinstance(module, PackedEmbedding):
            made: nn.Embedding | nn.Linear = nn.Embedding(module.rows, module.columns, dtype=module.compute_dtype)
        else:
            made = nn.Linear(module.columns, module.rows, bias=False, dtype=module.compute_dtype)
    if isinstance(module, PackedLinear) and isinstance(made, nn.Linear):
        made.bias = module.bias  # type: ignore[assignment]
    if numbers is not None:
        made.weight = nn.Parameter(numbers.to(module.compute_dtype))
    return made


def _widen(model: PreTrainedModel, layers: Mapping[str, nn.Module], tied: bool) -> None:
    for name, module in layers.items():
        if isinstance(module, PackedMatrix):
            put(model, name, _plain(module, module.numbers() if module.source is module else None))
    if tied:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(embedding, nn.Module)
        assert isinstance(head, nn.Module)
        head.weight = embedding.weight
