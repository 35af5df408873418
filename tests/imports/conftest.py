"""Statements run where nothing was imported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def forked() -> Iterator[Callable[[list[str]], Any]]:
    """What a list of statements leaves, run in a process of its own; see `forked.py`."""
    # Forking is safe in a process without threads.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(Path(__file__).with_name("forked.py"))]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(statements: list[str]) -> Any:
            server.stdin.write(json.dumps(statements) + "\n")
            server.stdin.flush()
            told = server.stdout.readline()
            assert told, "the process that forks has ended; its words stand above"
            return json.loads(told)

        yield run
        server.stdin.close()
