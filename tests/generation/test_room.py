"""What does not fit into memory is refused."""

from __future__ import annotations

import pytest

from dsa.config import DSAConfig
from dsa.generation import room
from dsa.models.extension import Demand
from dsa.models.loading import LoadedModel
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import tiny_tokenizer


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel(tiny_model("llama"), tiny_tokenizer(), "tiny", False)
    config, demand = DSAConfig(top_k=8, index_heads=2, index_head_dim=8, sinks=2, local=2), Demand(10**9, 20, 100)
    monkeypatch.setattr(room, "available_memory", lambda device: 10**8)
    with pytest.raises(ValueError, match=r"memory: reading 1,000,000,020 .*0.1 GB are free; about .*--tokens \d+00 "):
        room.check_room(loaded, config, demand, 4096)
    room.check_room(loaded, config, Demand(1000, 20, 100), 4096)
    monkeypatch.setattr(room, "available_memory", lambda device: 100)
    with pytest.raises(ValueError, match="not even a short text would fit"):
        room.check_room(loaded, config, demand, 4096)
    monkeypatch.setattr(room, "available_memory", lambda device: None)
    room.check_room(loaded, config, demand, 4096)
