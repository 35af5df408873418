"""State of AdamW by parameter name, in the shape in which checkpoints hold it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dsa.train.sharding import gathered, is_share, put

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def state_of(
    parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, torch.Tensor]:
    """Everything that the next update depends on: weights, and both moments and count of AdamW; on the CPU.

    Args:
        parameters: By name. If they lie in parts with all processes, these call together and get whole tensors.
        optimizer: Theirs.
        keep: Whether this process wants the state; if not it returns nothing.
    """
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in {"weight": parameter.detach(), **optimizer.state[parameter]}.items():
            # One at a time: together they may be more than the device holds.
            whole = gathered(value)
            if keep:
                tensors[f"{key}.{name}"] = whole.cpu().clone()
    return tensors


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
        put(parameter, weight)
        moments[number] = {kind: _like(parameter, tensors[f"{kind}.{name}"]) for kind in kinds}
    if kinds:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _like(parameter: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """A copy of a moment, in parts if its parameter is; a count of steps is always whole."""
    if not is_share(parameter) or moment.ndim == 0:
        return moment.clone()
    share = torch.zeros_like(parameter, dtype=moment.dtype)
    put(share, moment)
    return share
