"""The page of the commands says what their help says."""

import subprocess
import sys
from pathlib import Path

from dsa.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]


def test_the_page_is_current() -> None:
    command = [sys.executable, "scripts/cli_reference.py", "--check"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_every_command_has_its_place() -> None:
    headings = [line for line in (ROOT / "docs" / "reference" / "cli.md").read_text().splitlines() if line[:3] == "## "]
    assert headings == [f"## dsa {command}" for command in COMMANDS]
