"""Free memory as the system says it, a container's limit, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsa.config import DSAConfig
from dsa.eval import free_memory
from dsa.models.extension import Demand
from dsa.models.loading import LoadedModel
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import tiny_tokenizer

CPU = torch.device("cpu")


def test_some_memory_is_free() -> None:
    found = free_memory.available_memory(CPU)
    assert found is None or 1e6 < found < 1e15
    assert free_memory.available_memory(torch.device("meta")) is None


def group(folder: Path, limit: str) -> Path:
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text("7000\n")
    (folder / "memory.stat").write_text("anon 4000\ninactive_file 2000\n")
    return folder


@pytest.mark.parametrize(("limit", "left"), [("10000\n", 5000), ("max\n", None), ("6000\n", 1000), ("1000\n", 0)])
def test_a_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, left: int | None) -> None:
    monkeypatch.setattr(free_memory, "_CGROUPS", group(tmp_path, limit))
    monkeypatch.setattr(free_memory, "_of_machine", lambda: 8000)
    assert free_memory.available_memory(CPU) == (8000 if left is None else left)


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel(tiny_model("llama"), tiny_tokenizer(), "tiny", False)
    config, demand = DSAConfig(top_k=8, index_heads=2, index_head_dim=8, sinks=2, local=2), Demand(10**9, 20, 100)
    monkeypatch.setattr(free_memory, "available_memory", lambda device: 10**8)
    with pytest.raises(ValueError, match=r"memory: reading 1,000,000,020 .*0.1 GB are free; about .*--tokens \d+00 "):
        free_memory.check_room(loaded, config, demand, 4096)
    free_memory.check_room(loaded, config, Demand(1000, 20, 100), 4096)
    monkeypatch.setattr(free_memory, "available_memory", lambda device: 100)
    with pytest.raises(ValueError, match="not even a short text would fit"):
        free_memory.check_room(loaded, config, demand, 4096)
    monkeypatch.setattr(free_memory, "available_memory", lambda device: None)
    free_memory.check_room(loaded, config, demand, 4096)
