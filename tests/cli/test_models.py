"""`dsa models`: what is found on a disk, and what is said of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import dsa as library
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY

Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain model, one saved with indexers, a configuration alone, an unknown family, and one that cannot be read."""
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY)
    model.save_pretrained(tmp_path / "plain")
    library.attach(model, library.DSAConfig(top_k=64, index_heads=2, index_head_dim=8, sinks=1, local=8))
    model.save_pretrained(tmp_path / "saved")
    for name, config in (
        ("bare", '{"model_type": "llama"}'),
        ("unheard", '{"model_type": "unheard_of"}'),
        ("broken", "{"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    return tmp_path


def test_models_in_a_folder(dsa: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsa.models.on_disk._in_hub_cache", lambda: ())
    result = dsa("models", str(folder), "--tokens", "100", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    found = {Path(each["name"]).name: each for each in said["models"]}
    states = {name: each["state"] for name, each in found.items() if name != "default"}
    assert states == {"plain": "attachable", "saved": "trained", "bare": "no", "unheard": "no", "broken": "no"}
    reasons = {name: found[name]["reason"] for name in ("bare", "unheard", "broken")}
    assert reasons == {
        "bare": "it has no safetensors weights",
        "unheard": "dsa does not know the architecture 'unheard_of'",
        "broken": "its config.json cannot be read",
    }
    assert found["plain"]["bytes"] > (folder / "plain" / "model.safetensors").stat().st_size
    assert found["saved"]["memory"] > 0
    assert "llama" in said["attachable"]
    # A short name: the table has the width of the terminal.
    monkeypatch.chdir(folder)
    table = dsa("models", "plain", "--tokens", "100")
    assert table.exit_code == 0, table.output
    assert "takes indexers (dsa train)" in " ".join(table.stdout.split()), table.stdout
    assert "dsa train Qwen/Qwen3-8B --data TEXTS --steps 400 --out RUN (" in table.stdout
    assert "Born with DSA: deepseek_v32" in table.stdout


def test_models_in_the_hub_s_cache(dsa: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = folder / "hub" / "models--own--small"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0123")
    (cache / "snapshots").mkdir()
    (folder / "plain").rename(cache / "snapshots" / "0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(folder / "hub"))
    found = json.loads(dsa("models", "--json").stdout)["models"]
    assert [each["name"] for each in found if each["name"] != "default"] == ["own/small"]
