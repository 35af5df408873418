"""The dense stage: language modelling with full attention, exact resuming, and what it is the continuation of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import dsa
from dsa.testing.tiny_models import VOCABULARY, tiny_model
from dsa.testing.training import CONFIG, Recorder, attached, document_tokens, random_tokens, read_log
from dsa.testing.training import SETTINGS as WARMUP
from dsa.train import (
    DenseSettings,
    Holdout,
    NotFiniteError,
    RunOptions,
    SparseSettings,
    TokenStream,
    train_dense,
    train_indexers,
    train_sparse,
)
from dsa.train.dense import DenseStage
from dsa.train.language import read_window
from dsa.train.state import RunFolder

SETTINGS = DenseSettings(steps=6, seq_len=48, lr=1e-3, sequences=2)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stage(folder: Path, model: PreTrainedModel, stream: TokenStream, **changes: Any) -> DenseStage:
    return DenseStage(model, stream, replace(SETTINGS, **changes), RunFolder(folder), RunOptions())


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_a_model_from_random_weights_learns_and_loads_again(tmp_path: Path, model_type: str) -> None:
    pattern = torch.arange(3, 43).repeat(200)
    model, recorder = tiny_model(model_type), Recorder()
    before = {name: value.clone() for name, value in model.named_parameters()}
    result = train_dense(
        model,
        TokenStream.of(pattern),
        tmp_path / "run",
        replace(SETTINGS, steps=40, lr=1e-2),
        RunOptions(reporter=recorder),
    )
    losses = [record.language for record in recorder.records]
    assert losses[-1] < 0.3 * losses[0]
    assert (result.language, result.kl, result.indexers) == (losses[-1], {}, None)
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert not model.training
    assert not dsa.is_attached(model)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["log.jsonl", "model", "state.safetensors"]
    assert set(read_log(tmp_path / "run")[0]) == {"step", "tokens", "lr", "language"}

    loaded = AutoModelForCausalLM.from_pretrained(result.model).eval()
    assert type(loaded) is type(model)
    ids = pattern[None, :60]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_loss_is_the_model_s_own(tmp_path: Path) -> None:
    model = tiny_model("llama")
    expected = {name: value.clone() for name, value in model.named_parameters()}
    run = stage(tmp_path, model, random_tokens(), steps=1, max_grad_norm=1e9)
    ids = run.windows(0, 2).ids
    reference = tiny_model("llama")
    reference.load_state_dict(expected, strict=False)
    loss = reference(input_ids=ids, labels=ids).loss
    loss.backward()
    run.model.train()
    share = run.begin_step(0)
    total = sum(run._backward(run.windows(number), share) for number in range(2))
    torch.testing.assert_close(total, loss.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_packed_documents_do_not_see_each_other(tmp_path: Path) -> None:
    stream = document_tokens()
    run = stage(tmp_path, tiny_model("llama"), stream, seq_len=64)
    number = next(each for each in range(50) if run.windows(each).positions is not None)
    window = run.windows(number)
    assert window.positions is not None
    begin = int((window.positions[0] == 0).nonzero()[1])
    changed = window.ids.clone()
    changed[0, :begin] = (changed[0, :begin] + 1) % VOCABULARY
    with torch.no_grad():
        first = read_window(run.model, window, None).last_hidden_state[0, begin:]
        other = read_window(run.model, window._replace(ids=changed), None).last_hidden_state[0, begin:]
    assert torch.equal(first, other)


@pytest.mark.parametrize("stopped", [1, 4])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "expert_bias_rate": 0.01}])
def test_resume_is_exact(tmp_path: Path, stopped: int, changes: dict[str, Any]) -> None:
    settings = replace(SETTINGS, **changes)
    stream = document_tokens()
    whole = tiny_model("deepseek_v3")
    train_dense(whole, stream, tmp_path / "whole", settings)
    recorder = Recorder()
    stop = lambda: len(recorder.records) == stopped  # noqa: E731
    train_dense(
        tiny_model("deepseek_v3"), stream, tmp_path / "cut", settings, RunOptions(reporter=recorder, should_stop=stop)
    )
    # It begins with the same weights, since these say which model it is.
    resumed = tiny_model("deepseek_v3")
    train_dense(resumed, stream, tmp_path / "cut", settings, RunOptions(resume=True))
    assert read_log(tmp_path / "cut") == read_log(tmp_path / "whole")
    assert same(whole.state_dict(), resumed.state_dict())
    files = [load_file(tmp_path / name / "state.safetensors") for name in ("cut", "whole")]
    assert same(*files)


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    logs = []
    for recompute in (False, True):
        model = tiny_model("deepseek_v3")
        settings = replace(SETTINGS, gradient_checkpointing=recompute, expert_bias_rate=0.01)
        train_dense(model, random_tokens(), tmp_path / str(recompute), settings)
        assert not model.is_activation_checkpointing
        logs.append(read_log(tmp_path / str(recompute)))
    assert logs[0] == logs[1]


def test_it_is_the_sparse_stage_s_continuation(tmp_path: Path) -> None:
    """With every token selected, both stages make the same of the same windows; the indexers do not interfere."""
    stream = random_tokens()
    model = tiny_model("deepseek_v3")
    train_dense(model, stream, tmp_path / "dense", SETTINGS)
    other = attached("deepseek_v3", config=CONFIG.replace(top_k=64, sinks=0, local=0))
    settings = SparseSettings(steps=6, seq_len=48, all_parameters=True, lr=1e-3, sequences=2)
    train_sparse(other, stream, tmp_path / "sparse", settings)
    dense, sparse = ([line["language"] for line in read_log(tmp_path / name)] for name in ("dense", "sparse"))
    assert dense == pytest.approx(sparse, rel=1e-4)


def test_only_what_the_pattern_finds_learns(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.named_parameters()}
    train_dense(model, random_tokens(), tmp_path, replace(SETTINGS, parameters=r"layers\.1\.self_attn\.[qk]_proj"))
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert changed == [f"model.layers.1.self_attn.{each}_proj.weight" for each in "qk"]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_held_out_text_is_read_once(tmp_path: Path) -> None:
    holdout = Holdout.of(random_tokens(seed=3), 48, 2)
    recorder = Recorder()
    train_dense(
        tiny_model("llama"), random_tokens(), tmp_path, SETTINGS, RunOptions(holdout=holdout, reporter=recorder)
    )
    lines = [json.loads(line) for line in (tmp_path / "holdout.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"step", "dense"}] * 2


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is attached; the dense stage trains it without indexers"):
        train_dense(attached(), random_tokens(), tmp_path / "a", SETTINGS)
    with pytest.raises(ValueError, match="no router with a bias"):
        train_dense(tiny_model("llama"), random_tokens(), tmp_path / "b", replace(SETTINGS, expert_bias_rate=0.1))
    with pytest.raises(ValueError, match="small updates are lost"):
        train_dense(tiny_model("llama").to(torch.bfloat16), random_tokens(), tmp_path / "c", SETTINGS)
    train_dense(tiny_model("llama"), random_tokens(), tmp_path / "d", replace(SETTINGS, steps=2))
    with pytest.raises(ValueError, match=r"stage was dense, is now warmup"):
        train_indexers(attached(), random_tokens(), tmp_path / "d", WARMUP, RunOptions(resume=True))
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    with pytest.raises(NotFiniteError, match="the language-modelling loss became nan: lower --lr"):
        train_dense(model, random_tokens(), tmp_path / "e", SETTINGS)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"seq_len": 1}, "seq_len must be a whole number of at least 2"),
        ({"lr": 2.0}, "lr must lie between 0 and 1"),
        ({"expert_bias_rate": -0.1}, "expert_bias_rate must be a number from 0 to below 1, got -0.1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16"),
        ({"warmup_steps": 6}, "warmup_steps must be less than steps"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a number above 0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)
