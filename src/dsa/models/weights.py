"""Weights as a layer computes with them, however they are stored: in 4 or 8 bits, on disk, in parts.

What a parameter holds need not be numbers of the layer's matrix: packed weights are bytes of another shape, offloaded
ones have no data, and FP8 ones lack their scales. So a dtype is that of the layer's plain numbers, a device the one
that it runs on, and the entries of a matrix are what the layer makes of unit vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that a layer computes in."""


class Matrix(NamedTuple):
    """One matrix of a model: the parameter `name` of `module`, of `shape` (outputs and inputs for a linear layer)."""

    module: nn.Module
    name: str
    shape: tuple[int, int]


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype that a layer of a decoder computes in, with packed weights too.

    It is that of its norms and biases, which nobody packs; without any, that of its first plain weight, or fp32.

    Args:
        layer: A decoder layer, or a part of one.
    """
    plain = [p for n, p in layer.named_parameters() if p.dtype in PLAIN and ".indexer." not in f".{n}"]
    vectors = [p for p in plain if p.ndim == 1]
    return next((p.dtype for p in (*vectors, *plain)), torch.float32)


def execution_device(layer: nn.Module) -> torch.device:
    """The device that a layer runs on, where its weights lie on another one or on disk between its calls.

    Args:
        layer: A decoder layer, or a part of one.
    """
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device if not isinstance(device, int) else f"cuda:{device}")
    devices = [parameter.device for parameter in layer.parameters()]
    return next((device for device in devices if device.type != "meta"), [*devices, torch.device("cpu")][0])


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """The matrices of a model in their order, the same whether they are packed or not.

    Those of adapters and indexers are left out; so is what a packed layer keeps next to its weight.
    """
    for prefix, module in model.named_modules():
        if ".indexer." in f".{prefix}." or ".lora_" in prefix:
            continue
        outputs, inputs = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if isinstance(outputs, int) and isinstance(inputs, int) and not any(module.children()):
            yield Matrix(module, "weight", (outputs, inputs))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 2 and not name.startswith("lora_"):
                yield Matrix(module, name, (parameter.shape[0], parameter.shape[1]))


def is_plain(matrix: Matrix) -> bool:
    """Whether the parameter holds the matrix's numbers, in memory or with all processes together (FSDP2)."""
    weight: Any = getattr(matrix.module, matrix.name, None)
    if not isinstance(weight, torch.Tensor) or tuple(weight.shape) != matrix.shape or weight.dtype not in PLAIN:
        return False
    ordinary = type(weight.data) in (torch.Tensor, nn.Parameter) or hasattr(weight, "full_tensor")
    return ordinary and not weight.is_meta


@torch.no_grad()
def entries(matrix: Matrix, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Some entries of a matrix as the layer computes with them, fp32 `[n]` on the CPU.

    Args:
        matrix: Of a linear layer or an embedding, however stored, or any plain parameter.
        rows: int64 `[n]`.
        columns: int64 `[n]`.

    Raises:
        ValueError: The matrix is not plain, and its module is neither a linear layer nor an embedding.
    """
    module, weight = matrix.module, getattr(matrix.module, matrix.name, None)
    if is_plain(matrix):
        assert isinstance(weight, torch.Tensor)
        if hasattr(weight, "full_tensor"):
            # In parts with all processes (FSDP2), which then call this together.
            weight = weight.full_tensor()
        return weight.detach()[rows.to(weight.device), columns.to(weight.device)].float().cpu()
    if isinstance(weight, torch.Tensor) and weight.is_meta and hasattr(module, "_hf_hook"):
        from accelerate.utils import align_module_device

        with align_module_device(module):
            return entries(matrix, rows, columns)
    device, each = execution_device(module), torch.arange(len(rows))
    if hasattr(module, "embedding_dim"):
        return module(rows.to(device)).float().cpu()[each, columns]
    if not hasattr(module, "in_features"):
        raise ValueError(
            f"the weights of {type(module).__name__} are stored in a form that dsa cannot read; load the model in fp32 "
            "or bf16"
        )
    units = torch.zeros(len(rows) + 1, matrix.shape[1], dtype=_input_dtype(module))
    units[each, columns] = 1.0
    # The last row of zeros leaves the bias.
    made = module(units.to(device)).float().cpu()
    return made[each, rows] - made[-1, rows]


def _input_dtype(module: nn.Module) -> torch.dtype:
    """What a packed linear layer takes: its compute dtype, where it has one."""
    own = getattr(module, "compute_dtype", None)
    if own in PLAIN:
        return own
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dtype in PLAIN:
        return weight.dtype
    return compute_dtype(module)
