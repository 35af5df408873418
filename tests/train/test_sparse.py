"""The sparse stage: two losses that never mix, exact resuming, and models that load again."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import dsa
from dsa import DSAContext
from dsa.models import indexers_of
from dsa.models.decoder import head_logits
from dsa.testing.training import CONFIG, Recorder, attached, random_tokens, read_log
from dsa.train import NotFiniteError, RunOptions, SparseSettings, TokenStream, Window, train_sparse
from dsa.train.language import language_losses, predicted, read_window
from dsa.train.sparse import SparseStage
from dsa.train.state import RunFolder
from dsa.train.trainable import TrainableParameters

SETTINGS = SparseSettings(steps=6, seq_len=48, all_parameters=True, lr=1e-3, indexer_lr=1e-2, sequences=2)


def stage(folder: Path, model: PreTrainedModel | None = None, **changes: Any) -> SparseStage:
    settings = replace(SETTINGS, **changes)
    return SparseStage(model or attached(), random_tokens(), settings, RunFolder(folder), RunOptions())


def weights(model: PreTrainedModel, indexers: bool) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: value.clone() for name, value in state.items() if (".indexer." in name) == indexers}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gradients(run: SparseStage, window: Window) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one backward pass leaves at the model's parameters and at the indexers'."""
    kl = {layer: torch.zeros(()) for layer in run.trainers}
    run._backward(window, 0, 1.0, 1.0, kl)
    model = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    layers = {f"{n}.{name}": p.grad for n, t in run.trainers.items() for name, p in t.parameters.items()}
    return model, layers


def test_gradients_of_the_two_losses_never_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsa.train import layer, sparse

    run = stage(tmp_path / "both")
    run.model.train()
    model, layers = gradients(run, run.windows(0))
    assert model
    assert not any(".indexer." in name for name in model)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in layers.values())

    # Without the indexers' loss the model's gradients are the same, to the last bit.
    monkeypatch.setattr(layer, "indexer_loss", lambda *args, **kwargs: args[0].sum() * 0.0)
    alone, none = gradients(stage(tmp_path / "language"), run.windows(0))
    assert same(model, alone)
    assert all(grad.abs().sum() == 0 for grad in none.values() if grad is not None)
    monkeypatch.undo()

    # Without the language-modelling loss the indexers' are, and nothing reaches the model.
    real = sparse.language_losses
    monkeypatch.setattr(sparse, "language_losses", lambda *a, **k: tuple(each * 0.0 for each in real(*a, **k)))
    silent, theirs = gradients(stage(tmp_path / "indexers"), run.windows(0))
    assert same(layers, theirs)
    assert all(grad.abs().sum() == 0 for grad in silent.values())


def test_the_indexer_loss_is_over_the_selection_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsa.train import layer

    seen: list[Any] = []
    real = layer.indexer_loss

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs["indices"])
        assert not any(tensor.requires_grad for tensor in args[3:])
        return real(*args, **kwargs)

    monkeypatch.setattr(layer, "indexer_loss", watched)
    run = stage(tmp_path)
    gradients(run, run.windows(0))
    assert [tuple(each.shape) for each in seen] == [(1, 48, CONFIG.top_k)] * 2


@pytest.mark.parametrize("choice", [{"all_parameters": True}, {"all_parameters": False, "lora": 2}])
def test_checkpointing_changes_nothing(tmp_path: Path, choice: dict[str, Any]) -> None:
    if "lora" in choice:
        pytest.importorskip("peft")
    models = []
    for recompute in (False, True):
        model, recorder = attached(), Recorder()
        settings = replace(SETTINGS, gradient_checkpointing=recompute, steps=3, **choice)
        folder = tmp_path / str(recompute)
        train_sparse(model, random_tokens(), folder, settings, RunOptions(reporter=recorder))
        # Two layers, two sequences a step: nothing is counted twice.
        assert recorder.layers == 3 * 2 * 2
        models.append((model.state_dict(), read_log(folder)))
        assert not model.is_activation_checkpointing
    (first, log), (second, again) = models
    assert log == again
    assert same(first, second)


def test_losses_fall_and_all_learn(tmp_path: Path) -> None:
    pattern = torch.arange(3, 43).repeat(200)
    model, recorder = attached(), Recorder()
    before, indexers = weights(model, False), weights(model, True)
    settings = replace(SETTINGS, steps=40, lr=5e-3)
    result = train_sparse(model, TokenStream.of(pattern), tmp_path, settings, RunOptions(reporter=recorder))
    losses = [record.language for record in recorder.records]
    assert losses[-1] < 0.3 * losses[0]
    assert result.language == losses[-1]
    assert not any(torch.equal(value, before[name]) for name, value in weights(model, False).items())
    assert not any(torch.equal(value, indexers[name]) for name, value in weights(model, True).items())
    assert all(parameter.requires_grad for parameter in model.parameters())

    loaded = AutoModelForCausalLM.from_pretrained(result.model).eval()
    ids = pattern[None, :60]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert dsa.is_attached(loaded)


def test_only_what_the_pattern_finds_learns(tmp_path: Path) -> None:
    model = attached()
    before = weights(model, False)
    settings = replace(SETTINGS, all_parameters=False, parameters=r"layers\.1\.self_attn\.[qk]_proj")
    train_sparse(model, random_tokens(), tmp_path, settings)
    changed = [name for name, value in weights(model, False).items() if not torch.equal(value, before[name])]
    assert changed == [f"model.layers.1.self_attn.{each}_proj.weight" for each in "qk"]


@pytest.mark.parametrize("choice", [{"all_parameters": True}, {"all_parameters": False, "lora": 2}])
@pytest.mark.parametrize("layers", [3, 14])
def test_resume_is_exact(tmp_path: Path, choice: dict[str, Any], layers: int) -> None:
    if "lora" in choice:
        pytest.importorskip("peft")

    class Killed(Exception):
        pass

    def kill(count: int) -> None:
        if count == layers:
            raise Killed

    settings = replace(SETTINGS, **choice, distill=0.5)
    train_sparse(attached(), random_tokens(), tmp_path / "whole", settings, RunOptions(checkpoint_every=2))
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train_sparse(
            attached(), random_tokens(), run, settings, RunOptions(checkpoint_every=2, reporter=Recorder(at_layer=kill))
        )
    model = attached(seed=7)
    train_sparse(model, random_tokens(), run, settings, RunOptions(checkpoint_every=2, resume=True))
    assert read_log(run) == read_log(tmp_path / "whole")


def test_adapters_load_again_with_peft_and_attach(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = attached()
    dsa.detach(base)
    base.save_pretrained(tmp_path / "base")
    model = dsa_model(tmp_path / "base")
    settings = replace(SETTINGS, all_parameters=False, lora=2, lr=1e-2)
    result = train_sparse(model, random_tokens(), tmp_path / "run", settings)
    assert result.model == tmp_path / "run" / "adapter"
    ids = random_tokens(60, seed=4).ids.long()[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    untouched = again(ids).logits
    dsa.attach(again, indexers=result.indexers)
    adapted = peft.PeftModel.from_pretrained(again, result.model).eval()
    with torch.no_grad():
        got = adapted(ids).logits
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, untouched, atol=1e-3)

    merged = train_sparse(dsa_model(tmp_path / "base"), random_tokens(), tmp_path / "merged", settings, merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(merged.model).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, expected, atol=1e-4)


def dsa_model(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    dsa.attach(model, CONFIG)
    return model


def test_the_dense_model_in_bf16_has_its_own_head(tmp_path: Path) -> None:
    run = stage(tmp_path, distill=1.0, mixed_precision="bf16")
    window = run.windows(0)
    dense = run._read_dense(window)
    read = dense.last_hidden_state[:, :5], window.ids[:, :5]
    with run.precision():
        expected = run._dense_logits(dense, *read)
    with torch.no_grad():
        run.model.get_output_embeddings().weight.mul_(2.0)
    with run.precision():
        # Autocast keeps this cast of the head.
        student = head_logits(run.model, dense, *read)[0]
        assert torch.equal(run._dense_logits(dense, *read), expected)
    assert not torch.equal(student, expected)


def test_distillation_is_against_the_dense_model_as_it_was(tmp_path: Path) -> None:
    run = stage(tmp_path, distill=0.7)
    window = run.windows(0)
    original = copy.deepcopy(run.model)
    with torch.no_grad():
        for parameter in run.trainable.parameters.values():
            parameter.mul_(1.1)
    dense = run._read_dense(window)
    output = read_window(run.model, window, DSAContext())
    got = language_losses(
        run.model,
        output,
        window,
        teacher_hidden=dense.last_hidden_state,
        teacher=lambda hidden, ids: run._dense_logits(dense, hidden, ids),
    )
    teacher = original(window.ids, dsa_context=DSAContext(mode="dense")).logits[0, :-1].log_softmax(-1)
    student = run.model(window.ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    language = -student.gather(1, window.ids[0, 1:, None]).sum()
    divergence = (teacher.exp() * (teacher - student)).sum()
    assert torch.allclose(torch.stack(got), torch.stack((language, divergence)), rtol=1e-4)
    names = list(run.trainable.parameters)
    ours = torch.autograd.grad(got[0] + 0.7 * got[1], list(run.trainable.parameters.values()))
    theirs = torch.autograd.grad(language + 0.7 * divergence, list(run.trainable.parameters.values()))
    for name, a, b in zip(names, ours, theirs):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())), name


def test_predictions_stay_within_documents() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    window = Window(torch.zeros(1, 6, dtype=torch.int64), positions)
    assert predicted(window).tolist() == [[True, True, False, True, False]]
    assert predicted(window, 2).tolist() == [[False, False, False, True, False]]


def test_a_loss_that_is_not_finite_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsa.train import sparse

    recorder = Recorder()
    real = sparse.language_losses

    def failing(*args: Any, **kwargs: Any) -> Any:
        language, distillation = real(*args, **kwargs)
        return language * (float("nan") if len(recorder.records) == 3 else 1.0), distillation

    monkeypatch.setattr(sparse, "language_losses", failing)
    model = attached()
    with pytest.raises(NotFiniteError, match=r"step 4: the language-modelling loss became nan: lower --lr"):
        train_sparse(model, random_tokens(), tmp_path, SETTINGS, RunOptions(checkpoint_every=2, reporter=recorder))
    assert all(torch.isfinite(each).all() for each in model.parameters())
    monkeypatch.undo()
    resumed = Recorder()
    train_sparse(attached(), random_tokens(), tmp_path, SETTINGS, RunOptions(resume=True, reporter=resumed))
    assert [record.step for record in resumed.records] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"all_parameters": False}, "trains one of: --lora RANK, --all-parameters, --parameters PATTERN; got 0"),
        ({"lora": 4}, "got 2 of them"),
        ({"all_parameters": False, "lora": 0}, "lora must be a whole number of at least 1"),
        ({"lora_alpha": 2.0}, "lora_alpha=2.0 has no meaning without lora"),
        ({"distill": -1.0}, "distill must be a number of at least 0"),
        ({"indexer_lr": 2.0}, "indexer_lr must lie between 0 and 1"),
        ({"lr": 2.0}, "lr must lie between 0 and 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16"),
        ({"queries_per_update": 0}, "queries_per_update must be"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


def test_parameters_that_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match=r"'nothing' finds none of the .* parameters; they are named like model"):
        TrainableParameters(attached(), replace(SETTINGS, all_parameters=False, parameters="nothing"))
    with pytest.raises(ValueError, match="is not a regular expression"):
        TrainableParameters(attached(), replace(SETTINGS, all_parameters=False, parameters="("))
    with pytest.raises(ValueError, match=r"is bfloat16, in which small updates are lost; .*--mixed-precision bf16"):
        TrainableParameters(attached().to(torch.bfloat16), SETTINGS)


def test_mixed_precision_learns_too(tmp_path: Path) -> None:
    recorder = Recorder()
    settings = replace(SETTINGS, mixed_precision="bf16", gradient_checkpointing=True)
    train_sparse(attached(), random_tokens(), tmp_path, settings, RunOptions(reporter=recorder))
    assert len(recorder.records) == 6


def test_indexers_of_the_model_are_frozen_for_the_model_s_optimizer(tmp_path: Path) -> None:
    run = stage(tmp_path)
    own = {id(p) for indexer in indexers_of(run.model).values() for p in indexer.parameters()}
    assert not own & {id(p) for p in run.trainable.parameters.values()}


def test_a_device_out_of_memory_is_told_what_helps(tmp_path: Path) -> None:
    def exhaust(count: int) -> None:
        raise torch.OutOfMemoryError("out of memory")

    settings = replace(SETTINGS, distill=1.0)
    with pytest.raises(MemoryError, match=r"--gradient-checkpointing keeps .*--lora 16 takes .* no --distill"):
        train_sparse(attached(), random_tokens(), tmp_path, settings, RunOptions(reporter=Recorder(at_layer=exhaust)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 2e-3}, "--lr was 0.001, is now 0.002"),
        ({"seed": 1}, "--seed was 0, is now 1"),
        ({"sequences": 1}, "--sequences was 2, is now 1"),
        ({"all_parameters": False, "parameters": "mlp"}, "--all-parameters was True, is now False"),
    ],
)
def test_another_run_is_not_resumed(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    train_sparse(attached(), random_tokens(), tmp_path, replace(SETTINGS, steps=2))
    with pytest.raises(ValueError, match=message):
        train_sparse(
            attached(), random_tokens(), tmp_path, replace(SETTINGS, steps=2, **changes), RunOptions(resume=True)
        )
    model = attached(config=CONFIG.replace(top_k=12))
    with pytest.raises(ValueError, match=r"top_k.0 was 16, is now 12"):
        train_sparse(model, random_tokens(), tmp_path, replace(SETTINGS, steps=2), RunOptions(resume=True))
