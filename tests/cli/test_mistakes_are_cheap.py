"""A file that is not there is said before torch is imported, which takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

MISTAKES = (
    ("generate", "--file", "missing.pdf", "--ask", "Who?"),
    ("generate", "--ask", "Who?"),
    ("read", "--file", "missing.pdf"),
    ("explain", "--file", "missing.pdf"),
    ("eval", "--file", "missing.pdf"),
    ("demo", "--file", "missing.pdf"),
    ("calibrate", "default", "--data", "missing.txt", "--mass", "0.9"),
    ("export", "default", "--out", "."),
)
PROGRAM = """
import json, sys
from typer.testing import CliRunner
from dsa.cli.main import app
codes = [CliRunner().invoke(app, arguments).exit_code for arguments in json.loads(sys.argv[1])]
print(json.dumps([codes, "torch" in sys.modules]))
"""


def test_torch_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(MISTAKES)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        # Of a checkout the path may be relative.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    codes, has_torch = json.loads(finished.stdout)
    assert codes == [2] * len(MISTAKES)
    assert not has_torch
