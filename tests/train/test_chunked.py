"""Long sequences are read in chunks: the same losses, on every family, with documents, in narrow precision."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa.models.layer import LayerAttention
from dsa.testing.tiny_models import ONE_OF_EACH_KIND
from dsa.testing.training import SETTINGS, attached, document_tokens, random_tokens, read_log
from dsa.train import TokenStream, train_indexers, warmup


def losses(folder: Path, model: Any, stream: TokenStream, chunk: int, patch: pytest.MonkeyPatch) -> list[Any]:
    patch.setattr(warmup, "WHOLE", chunk)
    patch.setattr(warmup, "CHUNK", chunk)
    train_indexers(model, stream, folder, SETTINGS)
    assert not any("forward" in vars(module) for module in model.modules())
    return read_log(folder)


@pytest.mark.parametrize("family", ONE_OF_EACH_KIND)
@pytest.mark.parametrize("packed", [False, True])
def test_the_losses_are_those_of_whole_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, packed: bool
) -> None:
    stream = document_tokens() if packed else random_tokens()
    whole = losses(tmp_path / "whole", attached(family), stream, 8192, monkeypatch)
    parts = losses(tmp_path / "parts", attached(family), stream, 24, monkeypatch)
    for ours, theirs in zip(whole, parts):
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=2e-3, abs=2e-4)


def test_hidden_states_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsa.train import layer

    monkeypatch.setattr(layer, "TOKENS_AT_ONCE", 20)
    whole = losses(tmp_path / "a", attached().to(torch.bfloat16), random_tokens(), 8192, monkeypatch)
    parts = losses(tmp_path / "b", attached().to(torch.bfloat16), random_tokens(), 24, monkeypatch)
    for ours, theirs in zip(whole, parts):
        assert ours["kl_mean"] == pytest.approx(theirs["kl_mean"], rel=0.05)


def test_the_memory_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    script = Path(__file__).parents[2] / "benchmarks" / "train_memory.py"
    monkeypatch.setattr(LayerAttention, "dense", LayerAttention.dense)
    options = ("--small", "--tokens", "12000", "--queries", "8", "--device", "cpu", "--json", str(out))
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    figures = json.loads(out.read_text())
    assert (figures["tokens"], figures["attended_chunks"]) == (12000, 1)
    assert figures["loss"] > 0
