"""Free memory as the system says it, and a container's limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsa.runs import memory

CPU = torch.device("cpu")


def test_some_memory_is_free() -> None:
    found = memory.available_memory(CPU)
    assert found is None or 1e6 < found < 1e15
    assert memory.available_memory(torch.device("meta")) is None


def group(folder: Path, limit: str) -> Path:
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text("7000\n")
    (folder / "memory.stat").write_text("anon 4000\ninactive_file 2000\n")
    return folder


@pytest.mark.parametrize(("limit", "left"), [("10000\n", 5000), ("max\n", None), ("6000\n", 1000), ("1000\n", 0)])
def test_a_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, left: int | None) -> None:
    monkeypatch.setattr(memory, "_CGROUPS", group(tmp_path, limit))
    monkeypatch.setattr(memory, "_of_machine", lambda: 8000)
    assert memory.available_memory(CPU) == (8000 if left is None else left)
