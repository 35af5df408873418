"""A model in two shares against a whole one: the same losses and results, and a resume that is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytest.importorskip("accelerate")
pytest.importorskip("peft")

import dsa
from dsa.testing.tiny_models import tiny_model
from dsa.testing.training import launch, read_log

SCRIPT = """
import sys
import weakref
from dataclasses import replace
import torch
torch.set_num_threads(1)
from dsa.testing.tiny_models import tiny_model
from dsa.testing.training import SETTINGS, Recorder, attached, document_tokens, random_tokens
from dsa.train import DenseSettings, Holdout, RunOptions, SparseSettings, sparse, start_processes, warmup
from dsa.train import train_dense, train_indexers, train_sparse
out, shard = sys.argv[1:]
processes, _ = start_processes("cpu", shard == "shard")
stream = document_tokens()
options = RunOptions(processes=processes, holdout=Holdout.of(random_tokens(seed=5), 64, 1), checkpoint_every=3)
settings = replace(SETTINGS, steps=4, sequences=2)
train_indexers(attached(), stream, f"{out}/warmup", settings, options)
warmup.WHOLE = warmup.CHUNK = 24
train_indexers(attached(), stream, f"{out}/chunks", replace(settings, start="fitted"), options)

# Gradients of two sequences add up in each process; 33 rows leave the second one fewer.
common = dict(steps=4, seq_len=48, lr=1e-3, sequences=4, queries_per_update=16)
sizes = dict(tie_word_embeddings=True, intermediate_size=33)
whole = SparseSettings(**common, all_parameters=True, distill=0.5, gradient_checkpointing=True)
model = attached(**sizes)
before = [weakref.ref(each) for name, each in model.named_parameters() if ".indexer." not in name]

class Watched(sparse.SparseStage):
    def shard(self):
        super().shard()
        # On a GPU, whoever keeps them keeps the whole model there.
        assert shard == "whole" or not any(each() is not None for each in before)

sparse.SparseStage = Watched
train_sparse(model, stream, f"{out}/all", whole, options)
dense = DenseSettings(steps=4, seq_len=48, lr=1e-3, sequences=4)
train_dense(tiny_model("llama"), stream, f"{out}/dense", dense, options)
train_sparse(attached(), stream, f"{out}/lora", SparseSettings(**common, lora=4), options, merge=True)

if shard == "shard":
    done = Recorder()
    stop = lambda: len(done.records) == 2
    train_sparse(attached(**sizes), stream, f"{out}/again", whole, replace(options, reporter=done, should_stop=stop))
    train_sparse(attached(seed=9, **sizes), stream, f"{out}/again", whole, replace(options, resume=True))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of the runs of one process with the whole model, and of two with a share each."""
    folder = tmp_path_factory.mktemp("runs")
    for world, shard in ((1, "whole"), (2, "shard")):
        for code, output in launch(world, SCRIPT, str(folder / shard), shard):
            assert code == 0, output
    return folder / "whole", folder / "shard"


def assert_close(ours: Path, theirs: Path, tolerance: float = 1e-4) -> None:
    a, b = load_file(ours), load_file(theirs)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("run", ["warmup", "chunks", "all", "lora", "dense"])
def test_shares_have_the_losses_of_the_whole(runs: tuple[Path, Path], run: str) -> None:
    whole, shard = (read_log(folder / run) for folder in runs)
    assert len(whole) == len(shard) == 4
    for ours, theirs in zip(whole, shard):
        assert ours.get("kl") == pytest.approx(theirs.get("kl"), abs=1e-4)
        for name in ("language", "distillation"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-4)
    held: list[Any] = [json.loads((folder / run / "holdout.jsonl").read_text().splitlines()[-1]) for folder in runs]
    assert held[0]["dense"] == pytest.approx(held[1]["dense"], abs=1e-4)
    assert held[0].get("sparse") == pytest.approx(held[1].get("sparse"), abs=1e-4)
    for file in ("state.safetensors", *([] if run == "dense" else ["indexers.safetensors"])):
        assert_close(*(folder / run / file for folder in runs))


def test_results_of_shares_are_whole(runs: tuple[Path, Path]) -> None:
    import peft

    for file in (
        "all/model/model.safetensors",
        "lora/model/model.safetensors",
        "dense/model/model.safetensors",
        "lora/adapter/adapter_model.safetensors",
    ):
        assert_close(*(folder / file for folder in runs))
    ids = torch.arange(3, 40)[None]
    for run in ("all", "lora"):
        whole, shard = (AutoModelForCausalLM.from_pretrained(folder / run / "model") for folder in runs)
        assert dsa.is_attached(shard)
        torch.testing.assert_close(whole(ids).logits, shard(ids).logits, rtol=0, atol=1e-3)
    model = tiny_model("llama")
    dsa.attach(model, indexers=runs[1] / "lora")
    adapted = peft.PeftModel.from_pretrained(model, runs[1] / "lora" / "adapter")
    torch.testing.assert_close(adapted(ids).logits, shard(ids).logits, rtol=0, atol=1e-3)


def test_resuming_shares_is_exact(runs: tuple[Path, Path]) -> None:
    once, again = runs[1] / "all", runs[1] / "again"
    assert read_log(once) == read_log(again)
    assert_close(once / "state.safetensors", again / "state.safetensors", 0)
    assert_close(once / "model" / "model.safetensors", again / "model" / "model.safetensors", 0)
