"""The processes of a run: one, or as many as `torchrun` or `accelerate launch` started.

Every process holds the whole frozen model and the same weights to train, reads other sequences of each step, and
averages gradients with the others before each update. The weights therefore stay equal without being sent, and a
step's losses do not depend on how many processes share its sequences, up to rounding. A model that one device does
not hold is sharded instead (`dsa.train.sharding`).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from dsa.train.extras import needed

Result = TypeVar("Result")

UNSUPPORTED = ("DEEPSPEED", "MEGATRON_LM")


class Processes:
    """One process alone: nothing to agree on."""

    rank = 0
    size = 1
    device: torch.device | None = None
    shard = False
    """Whether the model's weights are shared out among the processes."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def mean_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces every tensor by its mean over the processes, in place."""

    def any(self, flag: bool) -> bool:
        """Whether it is true in some process."""
        return flag

    def on_main(self, action: Callable[[], Result]) -> Result:
        """What `action` returns in the main process, which alone runs it; an error of its is raised in all."""
        return action()


class ManyProcesses(Processes):
    """Processes joined by `torch.distributed`, which has been initialised.

    Args:
        device: Where tensors that travel must lie: the GPU with NCCL, the CPU with gloo.
        shard: Whether they share out the model's weights.
    """

    device: torch.device

    def __init__(self, device: torch.device, shard: bool = False) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()
        self.device = device
        self.shard = shard

    def mean_(self, tensors: Iterable[torch.Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        # One message for all: their number costs more than their size.
        for together in by_dtype.values():
            flat = torch.cat([tensor.detach().flatten() for tensor in together]).to(self.device)
            torch.distributed.all_reduce(flat)
            flat /= self.size
            for tensor, part in zip(together, flat.split([tensor.numel() for tensor in together])):
                tensor.detach().copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        told = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(told)
        return bool(told > 0)

    def on_main(self, action: Callable[[], Result]) -> Result:
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = action()
            except Exception as error:
                answer[1] = error
        torch.distributed.broadcast_object_list(answer, device=self.device)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]


def start_processes(device: str | None = None, shard: bool = False) -> tuple[Processes, str | None]:
    """Joins the processes that a launcher started; without one there is this process alone.

    Args:
        device: What the user asked for: `"cpu"`, `"cuda"`, or `None`.
        shard: Share out the model's weights too, for models that one device does not hold. A launcher that was told
            to use FSDP, version 2, asks for the same.

    Returns:
        The processes, and the device of this one: each takes the GPU of its local rank.

    Raises:
        ImportError: There are several, and `accelerate` is not installed.
        NotImplementedError: The launcher was told to split the model over devices in another way.
        ValueError: There is one process only, and the weights are to be shared out.
    """
    for name in UNSUPPORTED:
        if _is_set(f"ACCELERATE_USE_{name}"):
            raise NotImplementedError(
                f"dsa train does not split a model over devices with {name}: launch it without, and add --shard, which "
                "shares the model's weights out among the processes (FSDP2)"
            )
    shard = _launched_to_shard() or shard
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if shard:
            raise ValueError(
                "--shard shares the model's weights out among several processes, and this is the only one: start them "
                "with `torchrun --nproc-per-node N -m dsa train ... --shard`, or leave --shard out"
            )
        return Processes(), device
    state = needed("accelerate", "training in several processes").PartialState(cpu=device == "cpu")
    # Left to the interpreter's end, gloo's threads would abort the process.
    atexit.register(state.destroy_process_group)
    return ManyProcesses(state.device, shard), str(state.device)


def _launched_to_shard() -> bool:
    """Whether `accelerate launch` was told to use FSDP2."""
    if not _is_set("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise NotImplementedError(
            "dsa train shards models with FSDP version 2 only, and the launcher was told to use version 1: set "
            "`fsdp_version: 2` in its configuration, or launch without FSDP and add --shard"
        )
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        raise NotImplementedError(
            "dsa train keeps the shares of a sharded model on the devices: set `fsdp_offload_params: false` in the "
            "launcher's configuration, or use more processes"
        )
    # Otherwise transformers would load no weights in any process but the first.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return True


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
