"""The examples run as they are, on a tiny model."""

import runpy
import sys
from pathlib import Path

import pytest

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


def test_measure(tiny: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("examples/measure.py", tiny, text, "160")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["dense", "DSA", "window", "layer", "layer"]
