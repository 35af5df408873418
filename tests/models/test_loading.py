"""Loading models: what is accepted, what is refused and how, and the default model's converted copy."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from dsa.models import default_model
from dsa.models.default_model import default_model_dir, is_converted
from dsa.models.loading import load_model
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama", vocab_size=BYTE_VOCABULARY).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_directory(saved: Path) -> None:
    told: list[str] = []
    loaded = load_model(str(saved), device="cpu", status=told.append)
    assert (loaded.model.dtype, loaded.model.training, loaded.is_default) == (torch.float32, False, False)
    assert loaded.tokenizer.decode(loaded.tokenizer("héllo\n")["input_ids"]) == "héllo\n"
    assert told == [f"Loading {saved}"]


def test_dtype(saved: Path) -> None:
    assert load_model(str(saved), dtype=torch.bfloat16, device="cpu").model.dtype == torch.bfloat16


def _encoder(folder: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=50, **sizes)).save_pretrained(folder)


def _encoder_decoder(folder: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=50, **sizes)).save_pretrained(folder)


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "martian"}')


def _only_pickle(folder: Path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_encoder, "not a causal language model (it is BertForMaskedLM"),
        (_encoder_decoder, "not a causal language model (it is T5ForConditionalGeneration"),
        (_no_config, "without config.json"),
        (_broken_config, "is not JSON"),
        (_unknown_architecture, "martian"),
        (_only_pickle, "only safetensors weights are read, never pickle"),
        (_no_weights, "a configuration without weights; `dsa train --stage dense --from-scratch`"),
        (_truncated, "are damaged"),
        (_no_tokenizer, "no tokenizer could be read"),
    ],
)
def test_refused_directories(copy: Path, no_hub: None, damage: object, expected: str) -> None:
    damage(copy)  # type: ignore[operator]
    with pytest.raises((ValueError, OSError)) as caught:
        load_model(str(copy), device="cpu")
    message = str(caught.value)
    assert message.startswith("model: ")
    assert str(copy) in message
    assert expected in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./nothing-here", "there is no directory ./nothing-here"),
        ("a/b/c", "there is no directory a/b/c"),
        ("nobody/no-such-model", "the Hub cannot be reached"),
    ],
)
def test_names_that_lead_nowhere(no_hub: None, name: str, expected: str) -> None:
    with pytest.raises(OSError, match=r"^model: ") as caught:
        load_model(name, device="cpu")
    assert expected in str(caught.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"PK")
    with pytest.raises(OSError, match="is a file; expected a GGUF file, a directory"):
        load_model(str(file), device="cpu")


@pytest.fixture
def fake_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A default model that is converted at once; the list says how often it was."""
    gguf = tmp_path / "package" / "tiny.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"weights")
    conversions: list[Path] = []

    def read(file: Path) -> tuple[object, object]:
        conversions.append(file)
        return tiny_model("llama", vocab_size=BYTE_VOCABULARY), tiny_tokenizer()

    monkeypatch.setenv("DSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "default_gguf", lambda: gguf)
    monkeypatch.setattr(default_model.importlib.metadata, "version", lambda name: "0.0")
    monkeypatch.setattr(default_model, "_read_gguf", read)
    return conversions


def test_the_default_is_converted_once(fake_default: list[Path]) -> None:
    assert not is_converted()
    told: list[str] = []
    loaded = load_model(device="cpu", status=told.append)
    assert loaded.is_default
    assert told[0].startswith("Converting")
    load_model("default", device="cpu", status=told.append)
    assert is_converted()
    assert len(fake_default) == 1
    assert len(told) == 3


def test_another_file_is_converted_anew(fake_default: list[Path]) -> None:
    first = default_model_dir()
    default_model.default_gguf().write_bytes(b"other weights")
    assert default_model_dir() != first
    assert len(fake_default) == 2


def test_two_at_once_convert_once(fake_default: list[Path]) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(default_model_dir())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake_default) == 1
    assert len(found) == 3
    assert len(set(found)) == 1


def test_a_copy_damaged_in_the_middle_is_made_again(fake_default: list[Path]) -> None:
    """Its sizes are right: what a disk or a crash did to the content is found once, and later starts are cheap."""
    file = default_model_dir() / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:5000] + b"\xff" * 400 + whole[5400:])
    told: list[str] = []
    load_model(device="cpu", status=told.append)
    assert "model.safetensors has another content" in told[0]
    assert "onverting the default model" in told[0]
    assert len(fake_default) == 2
    assert file.read_bytes() == whole


def test_a_copy_is_compared_by_content_after_each_start_of_the_machine(
    fake_default: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = tmp_path / "boot_id"
    monkeypatch.setattr(default_model, "_BOOT", boot)
    compared: list[str] = []
    digest = default_model._digest
    monkeypatch.setattr(default_model, "_digest", lambda file: (compared.append(file.name), digest(file))[1])
    for start in ("1", "2"):
        boot.write_text(start)
        file = default_model_dir() / "model.safetensors"
        assert "model.safetensors" in compared
        compared.clear()
        default_model_dir()
        assert compared == ["tiny.gguf"]
    # Damage that neither size nor time shows.
    times, whole = file.stat(), file.read_bytes()
    file.write_bytes(whole[:5000] + b"\xff" * 400 + whole[5400:])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(fake_default) == 1
    boot.write_text("3")
    default_model_dir()
    assert len(fake_default) == 2
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "content", ["[]", "5", "null", '{"sha256": 1}', '{"source": "x", "sha256": {"a": 1}}', "[" * 2000]
)
def test_a_manifest_that_is_none_is_written_again(fake_default: list[Path], content: str) -> None:
    (default_model_dir() / default_model.MANIFEST).write_text(content)
    assert not is_converted()
    default_model_dir()
    assert is_converted()
    assert len(fake_default) == 2


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json", default_model.MANIFEST])
def test_a_damaged_copy_is_converted_again(fake_default: list[Path], lost: str) -> None:
    file = default_model_dir() / lost
    file.write_bytes(file.read_bytes()[:20])
    assert not is_converted()
    assert load_model(device="cpu").is_default
    assert len(fake_default) == 2


def test_what_a_killed_conversion_left_is_removed(fake_default: list[Path]) -> None:
    folder = default_model.cache_dir() / "models"
    leftover = folder / f".{default_model_dir().name}.part"
    shutil.rmtree(default_model_dir())
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    default_model_dir()
    assert not leftover.exists()
    assert is_converted()


def test_a_full_disk(fake_default: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(OSError, match=r"the disk is full.*set DSA_CACHE"):
        default_model_dir()
    assert [file.suffix for file in (default_model.cache_dir() / "models").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written(fake_default: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(OSError, match=r"cannot keep the converted default model in .*set DSA_CACHE"):
        default_model_dir()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "DEFAULT_PACKAGE", "llm-no-such-package")
    with pytest.raises(ImportError, match=r"is not installed: run `make install`"):
        load_model()


def test_without_what_reads_gguf(fake_default: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs gguf and accelerate: run `make install`"):
        load_model()


@pytest.mark.default_model
def test_the_default_model() -> None:
    loaded = load_model(device="cpu")
    assert loaded.model.config.num_hidden_layers == 30
    assert loaded.model.dtype == torch.float32
    assert not hasattr(loaded.model.config, "quantization_config")
    ids = torch.tensor([loaded.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        token = int(loaded.model(ids, logits_to_keep=1).logits[0, -1].argmax())
    assert loaded.tokenizer.decode([token]) == " Paris"
