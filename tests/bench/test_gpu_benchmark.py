"""`python -m benchmarks.gpu`: every section is found and imported from the repository's root."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_section_is_imported() -> None:
    pytest.importorskip("triton")
    code = (
        "from importlib import import_module; from benchmarks.gpu.__main__ import SECTIONS, start_interpreter; "
        "start_interpreter(); [import_module(f'benchmarks.gpu.{name}').rows for name in SECTIONS]"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_help_without_a_gpu() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.gpu", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: python -m benchmarks.gpu")
