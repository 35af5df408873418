"""Equal load of a model's experts without a loss for it (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

A router adds a bias to each expert's score where it selects, not where it weighs. After every step the bias of an
expert that got more tokens than the mean goes down by a fixed amount, that of one that got fewer goes up.

transformers keeps these biases as buffers, which no optimizer sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dsa.train.processes import Processes

BIAS = "e_score_correction_bias"


class ExpertBalance:
    """The routers' biases and the load of their experts in the running step.

    Args:
        model: The model.
        rate: How far one step moves a bias; with 0 nothing is watched and nothing moves.
        processes: Whose tokens are counted together.

    Raises:
        ValueError: There is a rate, but no router with such a bias.
    """

    def __init__(self, model: nn.Module, rate: float, processes: Processes) -> None:
        self.rate = rate
        self.processes = processes
        self.routers: dict[str, nn.Module] = {}
        if rate:
            self.routers = {name: module for name, module in model.named_modules() if hasattr(module, BIAS)}
        if rate and not self.routers:
            raise ValueError(
                f"expert_bias_rate: {type(model).__name__} has no router with a bias ({BIAS}), as DeepSeek-V3's have; "
                "leave the rate at 0"
            )
        self.loads = {name: torch.zeros_like(bias, dtype=torch.float32) for name, bias in self.biases.items()}

    @property
    def biases(self) -> dict[str, torch.Tensor]:
        """By router; fp32 `[experts]`."""
        return {name: getattr(router, BIAS) for name, router in self.routers.items()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts tokens by expert while the context is open."""
        hooks = [router.register_forward_hook(self._counter(name)) for name, router in self.routers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _counter(self, name: str) -> Any:
        def count(router: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
            # Held-out text is not what the experts share out. Checkpointing counts everything twice, alike.
            if router.training:
                load = self.loads[name]
                load += torch.bincount(output[-1].flatten(), minlength=len(load)).to(load)

        return count

    @torch.no_grad()
    def update(self) -> None:
        """Moves the biases by what the step counted, and starts counting again."""
        if not self.routers:
            return
        self.processes.mean_(self.loads.values())
        for name, bias in self.biases.items():
            load = self.loads[name]
            bias += self.rate * torch.sign(load.mean() - load)
            load.zero_()

    @torch.no_grad()
    def load(self, biases: dict[str, torch.Tensor]) -> None:
        """Takes the biases of a checkpoint.

        Raises:
            ValueError: They belong to other routers.
        """
        own = self.biases
        if {name: bias.shape for name, bias in own.items()} != {name: bias.shape for name, bias in biases.items()}:
            raise ValueError(f"resume: the checkpoint has biases of {sorted(biases)}, the model of {sorted(own)}")
        for name, bias in own.items():
            bias.copy_(biases[name])
