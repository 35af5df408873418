"""Whole runs on tiny models: they learn, they touch nothing else, and they say what goes wrong."""

from __future__ import annotations

import copy
import errno
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import dsa
from dsa import DSAConfig, DSAContext, LayerConfig
from dsa.eval.mass import measure_layer
from dsa.testing.training import CONFIG, SETTINGS, Recorder, attached, random_tokens, read_log
from dsa.train import (
    LineReporter,
    LiveReporter,
    NotFiniteError,
    RunOptions,
    StepRecord,
    TokenStream,
    WarmupSettings,
    train_indexers,
)


def mass_kept(model: Any, tokens: torch.Tensor) -> float:
    """Share of the attention mass that the model's own selection keeps, mean over layers."""
    kept: list[float] = []
    observe = lambda call: kept.append(measure_layer(call, CONFIG, 32).dsa)  # noqa: E731
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False, dsa_context=DSAContext(mode="dense", observer=observe))
    return sum(kept) / len(kept)


@pytest.mark.parametrize("target", ["far", "paper"])
def test_loss_falls_and_more_mass_is_kept_on_unseen_tokens(tmp_path: Path, target: Any) -> None:
    model = attached()
    unseen = random_tokens(96, seed=9).ids.long()[None]
    before = mass_kept(model, unseen)
    settings = WarmupSettings(steps=50, seq_len=128, queries_per_update=32, lr=1e-2, target=target)
    recorder = Recorder()
    result = train_indexers(model, random_tokens(), tmp_path / "run", settings, RunOptions(reporter=recorder))
    means = [record.mean_kl for record in recorder.records]
    assert sum(means[-5:]) < 0.7 * sum(means[:5])
    assert mass_kept(model, unseen) > before + 0.05
    assert recorder.begun == (0, 50, [0, 1])
    assert recorder.layers == 100
    assert result.step == 50
    assert result.kl == recorder.records[-1].kl

    fresh = attached(seed=5)
    dsa.load_indexers(fresh, result.indexers)
    assert mass_kept(fresh, unseen) == mass_kept(model, unseen)


def test_the_model_itself_is_untouched(tmp_path: Path) -> None:
    model = attached().train()
    before = {name: value.clone() for name, value in model.state_dict().items() if ".indexer." not in name}
    indexers = {name: value.clone() for name, value in model.state_dict().items() if ".indexer." in name}
    train_indexers(model, random_tokens(), tmp_path, SETTINGS)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(torch.equal(value, after[name]) for name, value in indexers.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss", "gemma2", "smollm3"])
def test_families_with_their_own_attention(tmp_path: Path, model_type: str) -> None:
    """No RoPE at all, sink logits, soft-capped scores with sliding layers, layers without RoPE."""
    model = attached(model_type)
    result = train_indexers(model, random_tokens(), tmp_path, SETTINGS)
    assert set(result.kl) == set(dsa.models.indexers_of(model))
    assert all(0 < value < 5 for value in result.kl.values())


def test_a_bf16_model_trains_fp32_indexers(tmp_path: Path) -> None:
    wide, narrow = attached(), attached()
    narrow.to(torch.bfloat16)
    settings = WarmupSettings(steps=30, seq_len=64, queries_per_update=16, lr=1e-2)
    expected = train_indexers(wide, random_tokens(), tmp_path / "wide", settings)
    got = train_indexers(narrow, random_tokens(), tmp_path / "narrow", settings)
    assert list(got.kl.values()) == pytest.approx(list(expected.kl.values()), rel=0.05)
    assert next(iter(dsa.models.indexers_of(narrow).values())).wq.weight.dtype == torch.bfloat16


def test_layers_have_their_own_local_and_may_be_dense(tmp_path: Path) -> None:
    config = CONFIG.replace(layers={0: LayerConfig(dense=True), 2: LayerConfig(local=12)})
    model = attached(config=config, num_hidden_layers=3)
    result = train_indexers(model, random_tokens(), tmp_path, SETTINGS)
    assert list(result.kl) == [1, 2]


def test_log_has_one_line_per_step(tmp_path: Path) -> None:
    train_indexers(attached(), random_tokens(), tmp_path, SETTINGS, RunOptions(checkpoint_every=4))
    log = read_log(tmp_path)
    assert [line["step"] for line in log] == list(range(1, 10))
    assert [line["tokens"] for line in log] == list(range(64, 640, 64))
    assert all(line["kl_mean"] == pytest.approx(sum(line["kl"].values()) / 2) for line in log)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "indexers.safetensors",
        "log.jsonl",
        "state.safetensors",
    ]


def test_stopping_writes_a_checkpoint(tmp_path: Path) -> None:
    recorder = Recorder()
    stop = lambda: len(recorder.records) == 4  # noqa: E731
    result = train_indexers(
        attached(), random_tokens(), tmp_path, SETTINGS, RunOptions(reporter=recorder, should_stop=stop)
    )
    assert result.step == 4
    resumed = train_indexers(attached(), random_tokens(), tmp_path, SETTINGS, RunOptions(resume=True))
    assert resumed.step == 9


def poison(model: Any, layer: int, value: float) -> None:
    """Makes the hidden states that reach a layer's attention not finite."""
    module = model.model.layers[layer].input_layernorm
    module.register_forward_hook(lambda _module, _args, output: output.index_fill(1, torch.tensor([40]), value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named_by_layer(tmp_path: Path, value: float) -> None:
    model = attached(num_hidden_layers=3)
    poison(model, 1, value)
    before = copy.deepcopy(dsa.models.indexers_of(model))
    with pytest.raises(NotFiniteError, match=r"stopped in step 1: the model's activations in layer 1 are not finite"):
        train_indexers(model, random_tokens(), tmp_path, SETTINGS)
    for layer, indexer in dsa.models.indexers_of(model).items():
        assert all(torch.equal(a, b) for a, b in zip(indexer.parameters(), before[layer].parameters()))


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsa.train import layer

    model, recorder = attached(), Recorder()
    real = layer.indexer_loss

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        return real(*args, **kwargs) * (float("nan") if len(recorder.records) == 6 else 1.0)

    monkeypatch.setattr(layer, "indexer_loss", failing)
    with pytest.raises(NotFiniteError, match=r"step 7: the loss of layer 0 became nan: lower the learning rate .0.01."):
        train_indexers(model, random_tokens(), tmp_path, SETTINGS, RunOptions(checkpoint_every=3, reporter=recorder))
    monkeypatch.undo()
    resumed = Recorder()
    train_indexers(attached(), random_tokens(), tmp_path, SETTINGS, RunOptions(resume=True, reporter=resumed))
    assert [record.step for record in resumed.records] == [7, 8, 9]


def test_models_that_cannot_be_trained(tmp_path: Path) -> None:
    from dsa.testing.tiny_models import tiny_model

    with pytest.raises(ValueError, match="is not attached"):
        train_indexers(tiny_model("llama"), random_tokens(), tmp_path, SETTINGS)
    dense = DSAConfig(layers={0: LayerConfig(dense=True), 1: LayerConfig(dense=True)})
    with pytest.raises(ValueError, match="has no indexer to train"):
        train_indexers(attached(config=dense), random_tokens(), tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="seq_len=64 leaves layer 0 nothing to learn"):
        train_indexers(attached(config=DSAConfig()), random_tokens(), tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="less than one sequence"):
        train_indexers(attached(), TokenStream.of(torch.arange(9)), tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1"):
        train_indexers(attached(), random_tokens(), tmp_path, SETTINGS, RunOptions(checkpoint_every=0))
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; choose another one"):
        train_indexers(attached(), random_tokens(), folder, SETTINGS)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    with pytest.raises(NotADirectoryError, match=r"notes.txt is a file; expected a folder"):
        train_indexers(attached(), random_tokens(), folder / "notes.txt", SETTINGS)
    train_indexers(attached(), random_tokens(), tmp_path / "done", SETTINGS)
    with pytest.raises(FileExistsError, match="holds a training run already; continue it with --resume"):
        train_indexers(attached(), random_tokens(), tmp_path / "done", SETTINGS)


def test_too_little_disk_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsa.train import state

    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"has 1\.0 kB free, checkpoints need .* kB; free some, .*Nothing was trained"):
        train_indexers(attached(), random_tokens(), tmp_path, SETTINGS)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    def block(record: StepRecord) -> None:
        (tmp_path / "log.jsonl").unlink()
        (tmp_path / "log.jsonl").mkdir()

    with pytest.raises(OSError, match=r"cannot write .*log.jsonl: .*; the last checkpoint is intact") as caught:
        train_indexers(attached(), random_tokens(), tmp_path, SETTINGS, RunOptions(reporter=Recorder(at_step=block)))
    assert caught.value.errno == errno.EISDIR


def test_reporters_draw_what_happened(tmp_path: Path) -> None:
    text = io.StringIO()
    train_indexers(
        attached(),
        random_tokens(),
        tmp_path / "a",
        SETTINGS,
        RunOptions(reporter=LineReporter(Console(file=text, width=200))),
    )
    lines = text.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/9", "9/9"]
    assert re.search(r"KL 0\.\d{4}  lr \d\.\d\de-\d\d  [\d,]+ tokens/s", lines[-1])
    drawn = io.StringIO()
    with LiveReporter(Console(file=drawn, force_terminal=True, width=100)) as live:
        train_indexers(attached(), random_tokens(), tmp_path / "b", SETTINGS, RunOptions(reporter=live))
    assert "9/9 steps" in drawn.getvalue()
    assert "KL by layer 0-1: " in drawn.getvalue()


def test_too_little_disk_before_a_later_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsa.train import state

    def fill(record: StepRecord) -> None:
        if record.step == 3:
            monkeypatch.setattr(state.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))

    with pytest.raises(OSError, match=r"1\.0 kB free, checkpoints need .*--resume\. What was written before is intact"):
        train_indexers(
            attached(),
            random_tokens(),
            tmp_path,
            SETTINGS,
            RunOptions(checkpoint_every=2, reporter=Recorder(at_step=fill)),
        )
    monkeypatch.undo()
    recorder = Recorder()
    train_indexers(attached(), random_tokens(), tmp_path, SETTINGS, RunOptions(resume=True, reporter=recorder))
    assert recorder.begun == (2, 9, [0, 1])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB"), MemoryError()])
def test_a_device_out_of_memory_is_told_what_helps(tmp_path: Path, error: Exception) -> None:
    def exhaust(count: int) -> None:
        raise error

    with pytest.raises(MemoryError, match=r"cpu ran out of memory in step 1 .*--seq-len 32 halves the act.*; --dt"):
        train_indexers(attached(), random_tokens(), tmp_path, SETTINGS, RunOptions(reporter=Recorder(at_layer=exhaust)))
