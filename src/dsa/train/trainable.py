"""Which parameters of a model learn from language modelling: low-rank adapters, all, or those a pattern finds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dsa.models.decoder import decoder_of
from dsa.train.extras import needed
from dsa.train.settings import DenseSettings, SparseSettings
from dsa.train.sharding import is_share, put_share

INDEXER = ".indexer."
ADAPTER = ".lora_"


class TrainableParameters:
    """The parameters that learn. All others of the model are frozen, those of its indexers too.

    Args:
        model: The model; adapters are put into it.
        settings: Say which.

    Raises:
        ImportError: Adapters need the package `peft`.
        ValueError: The pattern finds nothing, or what it finds is too narrow to be trained.
    """

    def __init__(self, model: PreTrainedModel, settings: SparseSettings | DenseSettings) -> None:
        self.model = model
        self.adapter: Any = None
        self._before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.requires_grad_(False)
        if isinstance(settings, SparseSettings) and settings.lora is not None:
            self.adapter = _with_adapters(model, settings)
            names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        else:
            names = _matching(model, settings.parameters or "")
        self.parameters = {name: p for name, p in model.named_parameters() if name in names and INDEXER not in name}
        _check_width(self.parameters)
        model.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def count(self) -> int:
        """How many numbers learn."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def follow(self, replace: Callable[[], None]) -> None:
        """Runs what puts other parameters under the same names, as sharding does, and takes those."""
        names = list(self.parameters)
        # Held on to, each whole weight would stay on the device.
        self.parameters = {}
        replace()
        self.parameters = {name: self.model.get_parameter(name) for name in names}

    def clone(self) -> dict[str, torch.Tensor]:
        """The parameters as they are now."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @contextmanager
    def replaced_by(self, values: dict[str, torch.Tensor]) -> Iterator[None]:
        """The model has these values while the context is open.

        Args:
            values: All or some of the parameters, sharded or whole as they are in the model at that time.
        """
        parameters = {name: self.model.get_parameter(name) for name in values}
        own = {name: parameter.data for name, parameter in parameters.items()}
        shares = {name: each.clone() for name, each in own.items() if is_share(each)}
        try:
            for name, parameter in parameters.items():
                # FSDP knows its shares by their memory.
                if name in shares:
                    put_share(parameter, values[name])
                else:
                    parameter.data = values[name]
            yield
        finally:
            for name, parameter in parameters.items():
                if name in shares:
                    put_share(parameter, shares[name])
                else:
                    parameter.data = own[name]

    def unfreeze(self) -> None:
        """Gives every parameter the `requires_grad` that it had before; adapters stay."""
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            if name in self._before:
                parameter.requires_grad_(self._before[name])

    def merged(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of a model with adapters as `merge` would leave them. Changes what it is given."""
        for name in [each for each in weights if each.endswith(".base_layer.weight")]:
            place = name.removesuffix(".base_layer.weight")
            module: Any = self.model.get_submodule(place)
            for adapter, scale in module.scaling.items():
                low, high = (weights[f"{place}.lora_{letter}.{adapter}.weight"] for letter in "AB")
                delta = high @ low * scale
                weights[name] += (delta.T if module.fan_in_fan_out else delta).to(weights[name].dtype)
        return {name.replace(".base_layer.", "."): each for name, each in weights.items() if ADAPTER not in name}

    def merge(self) -> None:
        """Adds the adapters to the weights that they belong to, and removes them."""
        if self.adapter is not None:
            self.adapter.merge_and_unload()
            self.adapter = None


def _is_router(module: nn.Module) -> bool:
    """Whether a linear layer of a model returns more than a product, as Llama 4's router does."""
    return type(module).__module__.startswith("transformers.models.") and "forward" in vars(type(module))


def _with_adapters(model: PreTrainedModel, settings: SparseSettings) -> Any:
    peft = needed("peft", "training low-rank adapters")
    linear = {
        name.rpartition(".")[2]
        for name, module in decoder_of(model).named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and INDEXER not in f".{name}." and not _is_router(module)
    }
    assert settings.lora is not None
    config = peft.LoraConfig(
        r=settings.lora,
        lora_alpha=settings.lora_alpha or 2 * settings.lora,
        target_modules=sorted(linear),
        exclude_modules=r".*\.indexer\..*",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)
    return peft.get_peft_model(model, config)


def _matching(model: PreTrainedModel, pattern: str) -> set[str]:
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"parameters: {pattern!r} is not a regular expression ({error})") from error
    names = [name for name, _ in model.named_parameters() if INDEXER not in name]
    found = {name for name in names if wanted.search(name)}
    if not found:
        raise ValueError(
            f"parameters: {pattern!r} finds none of the {len(names)} parameters; they are named like "
            f"{', '.join(names[1:4])}"
        )
    return found


def _check_width(parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if not parameter.is_floating_point() or parameter.dtype.itemsize < torch.float32.itemsize:
            raise ValueError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, in which small updates are lost; load the "
                "model with --dtype float32 and compute in bf16 with --mixed-precision bf16, or train --lora RANK"
            )
