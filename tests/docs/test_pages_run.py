"""Every example of README and docs, pasted page by page in order, one process a page, on small local models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = Path(__file__).with_name("run_page.py")


def has_examples(page: Path) -> bool:
    return any(
        line == "```python" or line.startswith("dsa ") or "| dsa " in line for line in page.read_text().splitlines()
    )


PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if has_examples(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_pasted_in_order_runs(page: Path, tmp_path: Path) -> None:
    alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    finished = subprocess.run(
        [sys.executable, str(RUN), str(page), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, **alone},
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    ran = json.loads(finished.stdout.splitlines()[-1])
    assert sum(ran.values()) > 0
