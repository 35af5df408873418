"""The examples run as they are, on a tiny model."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import dsa
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.filterwarnings("ignore:324 tokens are more than")
def test_attach_and_generate(tiny: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("examples/attach_and_generate.py", tiny, text)
    printed = capsys.readouterr().out
    assert "sparse, reads 512 tokens per query" in printed
    assert "plain model, next token: " in printed


def test_save_and_reload(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("examples/save_and_reload.py", str(tmp_path / "saved"), tiny)
    assert "logits bit-identical: True" in capsys.readouterr().out


def test_lm_eval_attached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dsa-attention[lm-eval]'")
    tiny_model("llama", vocab_size=BYTE_VOCABULARY, max_position_embeddings=1024).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    run("examples/lm_eval_attached.py", str(tmp_path), "32")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "right choices" in line] == ["dense", "DSA"]


def test_shuffle_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    dsa.attach(model, TINY_CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    run("examples/shuffle_a_layer.py", str(tmp_path / "shuffled"), "1", str(tmp_path / "model"))
    assert "layer 1 is shuffled" in capsys.readouterr().out
    dsa.detach(model)
    dsa.attach(model, indexers=str(tmp_path / "shuffled"))
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert all("layers.1." in name for name in changed)


def test_measure(tiny: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("examples/measure.py", tiny, text, "160")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["dense", "DSA", "window", "layer", "layer"]
