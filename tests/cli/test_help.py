"""Help that reads well and costs nothing."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import Result

from dsa import __version__
from dsa.cli.main import COMMANDS


def test_the_overview(dsa: Callable[..., Result]) -> None:
    result = dsa("--help")
    assert result.exit_code == 0
    positions = [result.stdout.find(f" {command} ") for command in COMMANDS]
    assert positions == sorted(positions)
    assert -1 not in positions
    assert "`default`: SmolLM2-135M" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command(dsa: Callable[..., Result], command: str) -> None:
    result = dsa(command, "--help")
    assert result.exit_code == 0
    assert f"dsa {command}" in result.stdout
    assert "[bold]" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_no_command_shows_the_overview(dsa: Callable[..., Result]) -> None:
    result = dsa()
    assert result.exit_code == 2
    assert "demo" in result.output


def test_version(dsa: Callable[..., Result]) -> None:
    assert dsa("--version").stdout == f"dsa {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['dsa', 'demo', '--help']\n"
        "from dsa.cli.main import run\n"
        "try: run()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(*(name for name in ('torch', 'transformers', 'numpy', 'safetensors') if name in sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["demo", "--nonsense"], ["eval", "default"], ["demo", "--tokens", "many"], ["generate"]]
)
def test_wrong_arguments(dsa: Callable[..., Result], arguments: list[str]) -> None:
    result = dsa(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.stderr
    assert not result.stdout
