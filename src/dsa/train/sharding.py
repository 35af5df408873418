"""A model that no single device holds: every process keeps a share of each weight (PyTorch's FSDP2).

A layer is put together from all processes' shares when it is about to compute, and given up after. What stands outside
the layers (embeddings, final norm, head) is one more such unit, put together for a whole pass. So every process must
run the same passes, which equal numbers of sequences see to.

Indexers are small, and training works on copies of them: they stay whole in every process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from dsa.models import indexers_of
from dsa.models.families import family_of

Result = TypeVar("Result")


class Sharded:
    """A model whose weights are shared out among processes, which it stays.

    Args:
        model: An attached model; its weights may lie on the CPU. They move to the device a layer at a time.
        device: Of this process; the same kind in all.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.model = model
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        indexers = [indexer.to(device) for indexer in indexers_of(model).values()]
        whole = {parameter for indexer in indexers for parameter in indexer.parameters()}
        layers = family_of(model).blocks(model)
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=whole)
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        self.outside_layers = [name for name, each in model.named_parameters() if id(each) not in inside]
        """Names of the parameters that belong to no layer."""
        # Given up after a pass too: one without gradients would otherwise leave weights that the next update outdates.
        self._pass: nn.Module = _Pass(model)
        fully_shard(self._pass, mesh=mesh, reshard_after_forward=True, ignored_params=whole)

    def run_pass(self, function: Callable[[], Result]) -> Result:
        """Runs a function that calls the model or parts of it; what it returns may be the root of a backward pass.

        Outside of it the parameters that do not belong to a layer are shares.
        """
        result: Result = self._pass(function)
        return result

    def state_dict(self, keep: bool) -> dict[str, torch.Tensor]:
        """The model's weights, whole and on the CPU; called by all processes together.

        Args:
            keep: Whether this process wants them; if not it returns nothing.
        """
        found: dict[int, torch.Tensor] = {}
        named: dict[str, torch.Tensor] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            # Tied weights are one tensor under two names, and remain so.
            if id(tensor) not in found:
                full = gathered(tensor.detach())
                found[id(tensor)] = full.cpu() if keep else full.new_empty(0)
            named[name] = found[id(tensor)]
        return named if keep else {}


class _Pass(nn.Module):
    """What FSDP takes for the root: the model, with one pass of whatever kind as its forward."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Result]) -> Result:
        return function()


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is, or put together from all processes' shares, which then all must call this."""
    share: Any = tensor
    whole: torch.Tensor = share.full_tensor() if is_share(tensor) else tensor
    return whole


def is_share(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in parts with all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@torch.no_grad()
def put(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copies a tensor into another; of one that lies in parts, each process writes its own."""
    place: Any = target
    if is_share(target):
        mesh, place = place.device_mesh, place.to_local()
        # FSDP cuts the first dim as torch.chunk does; the last processes may have nothing.
        parts = whole.chunk(mesh.size())
        whole = parts[mesh.get_local_rank()] if mesh.get_local_rank() < len(parts) else whole[:0]
    place.copy_(whole)


@torch.no_grad()
def put_share(target: Any, share: Any) -> None:
    """Copies one process's part of a tensor over another's."""
    target.to_local().copy_(share.to_local())
