"""The kernels compile to machine code: what the interpreter accepts the compiler need not. No GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu" / "resources.py"


@pytest.mark.parametrize(
    ("target", "kernels", "instruction"),
    [
        (80, "gqa bfloat16 forward attend", "HMMA"),
        (90, "mla bfloat16 forward attend", "HGMMA"),
        (90, "sinks", "HMMA"),
        (90, "packed bfloat16 128 heads paged", "HGMMA"),
        (80, "packed bfloat16 16 heads", "HMMA"),
        (80, "append", "REG"),
    ],
)
def test_machine_code(target: int, kernels: str, instruction: str) -> None:
    """In a process of its own, because here kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--targets", str(target), "--kernel", kernels]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    header, *rows = run.stdout.splitlines()
    columns = header.split()[1:]
    assert rows
    numbers = [dict(zip(columns, row[62:].split())) for row in rows]
    assert all(int(row["shared"]) <= 227 << 10 for row in numbers)
    assert int(numbers[0][instruction]) > 0
