"""The pages of the commands say what their help says."""

import subprocess
import sys
from pathlib import Path

from dsa.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]


def test_the_pages_are_current() -> None:
    command = [sys.executable, "scripts/cli_reference.py", "--check"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_every_command_has_its_page() -> None:
    reference = ROOT / "docs" / "reference"
    assert {file.stem for file in (reference / "cli").glob("*.md")} == set(COMMANDS)
    for command in COMMANDS:
        assert f"\n# dsa {command}\n" in (reference / "cli" / f"{command}.md").read_text()
        assert f"(cli/{command}.md)" in (reference / "cli.md").read_text()
        assert f"reference/cli/{command}.md" in (ROOT / "mkdocs.yml").read_text()
