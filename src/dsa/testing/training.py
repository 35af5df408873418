"""What tests of training share: a tiny attached model, tokens for it, and a run of a second."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import dsa
from dsa.testing.tiny_models import VOCABULARY, tiny_model
from dsa.train import Reporter, StepRecord, TokenStream, WarmupSettings

CONFIG = dsa.DSAConfig(top_k=16, index_heads=4, index_head_dim=16, sinks=1, local=4)
SETTINGS = WarmupSettings(steps=9, seq_len=64, queries_per_update=16, lr=1e-2)


def attached(
    model_type: str = "llama", seed: int = 0, config: dsa.DSAConfig = CONFIG, **changes: Any
) -> PreTrainedModel:
    """A tiny model with untrained indexers; the seed is that of the indexers."""
    model = tiny_model(model_type, **changes)
    torch.manual_seed(seed)
    dsa.attach(model, config)
    return model


def random_tokens(count: int = 20_000, seed: int = 0) -> TokenStream:
    """Training data without any pattern: what the model attends to is still a function of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    return TokenStream.of(torch.randint(3, VOCABULARY, (count,), generator=generator))


def document_tokens(documents: int = 200, seed: int = 0) -> TokenStream:
    """The same in documents of 20 to 179 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 180, (documents,), generator=generator)
    return TokenStream.of(random_tokens(int(lengths.sum()), seed).ids, lengths.cumsum(0) - lengths)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The log without the times, which differ from run to run."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def launch(world: int, script: str, *arguments: str) -> list[tuple[int, str]]:
    """Runs a script in so many processes that know of each other; exit code and output of each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    processes = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", script, *arguments]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return [(process.communicate(timeout=240)[0], process.returncode)[::-1] for process in processes]


class Recorder(Reporter):
    """Keeps every record; runs `at_step` after each and `at_layer` after each layer of each step."""

    def __init__(
        self,
        at_step: Callable[[StepRecord], None] = lambda record: None,
        at_layer: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.records: list[StepRecord] = []
        self.layers = 0
        self.begun: tuple[int, int, list[int]] | None = None
        self.at_step = at_step
        self.at_layer = at_layer

    def begin(self, done: int, steps: int, layers: list[int]) -> None:
        self.begun = (done, steps, layers)

    def layer(self) -> None:
        self.layers += 1
        self.at_layer(self.layers)

    def step(self, record: StepRecord) -> None:
        self.records.append(record)
        self.at_step(record)
