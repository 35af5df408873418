"""State of AdamW by parameter name, in the shape in which checkpoints hold it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def state_of(parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything that the next update depends on: weights, and both moments and count of AdamW; on the CPU."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    return {name: tensor.cpu().clone() for name, tensor in tensors.items()}


def load_state(
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    what: str,
) -> None:
    """Takes what `state_of` returned.

    Args:
        parameters: By name, in the order in which the optimizer has them.
        optimizer: An AdamW with one group.
        tensors: The state.
        what: Whose it is, for messages.

    Raises:
        ValueError: A tensor is missing, left over, or has another shape.
    """
    # AdamW has no moments before its first step.
    kinds = MOMENTS if any(not name.startswith("weight.") for name in tensors) else ()
    names = [f"{kind}.{name}" for name in parameters for kind in ("weight", *kinds)]
    if sorted(names) != sorted(tensors):
        raise ValueError(f"{what}: expected the tensors {sorted(names)}, found {sorted(tensors)}")
    moments = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        weight = tensors[f"weight.{name}"]
        if weight.shape != parameter.shape:
            raise ValueError(f"{what}: {name} must be {list(parameter.shape)}, found {list(weight.shape)}")
        with torch.no_grad():
            parameter.copy_(weight)
        moments[number] = {kind: tensors[f"{kind}.{name}"].clone() for kind in kinds}
    if kinds:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
