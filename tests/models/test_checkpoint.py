"""Indexer files: written whole, read with every check, never mistaken for another model's."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import dsa
from dsa import DSAConfig
from dsa.models.attached import indexers_of, report_of
from dsa.models.attachment import put_on, take_off
from dsa.models.checkpoint import read_indexers
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    dsa.attach(model, TINY_CONFIG)
    return dsa.save_indexers(model, tmp_path)


def test_round_trip_takes_the_config_along(saved: Path) -> None:
    first, second = tiny_model("llama"), tiny_model("llama")
    torch.manual_seed(1)
    dsa.attach(first, indexers=saved)
    report = dsa.attach(second, indexers=saved.parent)
    assert not report.trained
    assert report.config == TINY_CONFIG.replace(index_rope_dim=2)
    tokens = tiny_tokens(1, 40)
    assert torch.equal(first(tokens).logits, second(tokens).logits)
    overridden = tiny_model("llama")
    assert dsa.attach(overridden, indexers=saved, top_k=12).config.top_k == 12


def rewritten(file: Path, **fields: str | None) -> None:
    """Changes fields of a file's metadata; `None` takes one out."""
    with safe_open(file, framework="pt") as opened:
        metadata = {**opened.metadata(), **fields}
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(weights, file, metadata={name: value for name, value in metadata.items() if value is not None})


def test_trained_is_what_training_wrote(tmp_path: Path) -> None:
    """Saving random indexers does not make them trained ones, however often they are loaded and saved again."""
    model = tiny_model("llama")
    assert not dsa.attach(model, TINY_CONFIG).trained
    for number, told in enumerate((None, None, True, None, False)):
        file = dsa.save_indexers(model, tmp_path / f"{number}.safetensors", trained=told)
        dsa.load_indexers(model, file)
        expected = number in (2, 3)
        assert report_of(model).trained is expected
        folder = tmp_path / f"model {number}"
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert report_of(loaded).trained is expected
        again = tiny_model("llama")
        assert dsa.attach(again, indexers=file).trained is expected
        assert put_on(again, take_off(again)).trained is expected
    dsa.detach(loaded)
    assert not hasattr(loaded.config, "dsa_trained")


def test_files_from_before_the_field_are_trained(saved: Path) -> None:
    rewritten(saved, trained=None)
    assert dsa.attach(tiny_model("llama"), indexers=saved).trained


def test_layers_without_an_indexer_need_none(saved: Path) -> None:
    model = tiny_model("llama")
    dsa.attach(model, indexers=saved, layers={0: {"dense": True}})
    dsa.save_indexers(model, saved)
    with pytest.raises(ValueError, match="has none for layer 0"):
        dsa.attach(tiny_model("llama"), indexers=saved, layers={})


def test_load_into_an_attached_model(saved: Path) -> None:
    source = tiny_model("llama")
    dsa.attach(source, indexers=saved)
    model = tiny_model("llama")
    dsa.attach(model, TINY_CONFIG)
    dsa.load_indexers(model, saved)
    for layer, indexer in indexers_of(model).items():
        assert torch.equal(indexer.wq.weight, indexers_of(source)[layer].wq.weight)


def test_stored_narrower_and_base_model_converted(saved: Path) -> None:
    model = tiny_model("llama")
    dsa.attach(model, indexers=saved)
    file = dsa.save_indexers(model, saved.parent / "half.safetensors", dtype=torch.float16)
    assert file.stat().st_size < saved.stat().st_size
    dsa.attach(tiny_model("llama").bfloat16(), indexers=file)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("qwen3", {}), "trained for another model: its model_type is 'llama'"),
        (("llama", {"hidden_size": 64}), "hidden_size is 32"),
        (("llama", {"num_hidden_layers": 3}), "num_hidden_layers is 2"),
        (("llama", {"seed": 1}), "another model of the same size"),
    ],
)
def test_another_models_indexers(saved: Path, other: tuple, message: str) -> None:
    model_type, changes = other
    model = tiny_model(model_type, **changes)
    with pytest.raises(ValueError, match=message):
        dsa.attach(model, indexers=saved)
    assert not dsa.is_attached(model)


@pytest.mark.parametrize("sizes", [{"index_heads": 3}, {"index_head_dim": 16}, {"index_rope_dim": 4}])
def test_other_sizes(saved: Path, sizes: dict) -> None:
    with pytest.raises(ValueError, match=r"has \w+=\d+, but the config asks for"):
        dsa.attach(tiny_model("llama"), indexers=saved, **sizes)


def test_files_say_how_many_dims_rotate(saved: Path) -> None:
    assert read_indexers(saved).config.index_rope_dim == DSAConfig(index_head_dim=8).rope_dim == 2
    with safe_open(saved, framework="pt") as opened:
        config = {**json.loads(opened.metadata()["config"]), "index_rope_dim": None}
    rewritten(saved, config=json.dumps(config))
    assert read_indexers(saved).config.rope_dim == 8, "the first files meant all dims"


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_file(saved: Path, kept: int) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[:kept])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        dsa.attach(tiny_model("llama"), indexers=saved)


def test_corrupt_and_foreign_files(saved: Path) -> None:
    saved.write_bytes(b"\xff" * 4096)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        dsa.attach(tiny_model("llama"), indexers=saved)
    save_file({"x": torch.zeros(2)}, saved)
    with pytest.raises(ValueError, match="not an indexer file"):
        dsa.attach(tiny_model("llama"), indexers=saved)
    save_file({"x": torch.zeros(2)}, saved, metadata={"format": "dsa-indexers", "version": "99"})
    with pytest.raises(ValueError, match="format version 99"):
        dsa.attach(tiny_model("llama"), indexers=saved)


def test_missing_file_and_pickles(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dsa train MODEL --out"):
        dsa.attach(tiny_model("llama"), indexers=tmp_path)
    (tmp_path / "indexers.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"only \.safetensors"):
        dsa.attach(tiny_model("llama"), indexers=tmp_path / "indexers.pt")


def test_full_disk_keeps_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(tensors: object, path: str, metadata: object = None) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    model = tiny_model("llama")
    dsa.attach(model, TINY_CONFIG)
    with pytest.raises(OSError, match=r"cannot write .*indexers\.safetensors: the disk is full"):
        dsa.save_indexers(model, saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
