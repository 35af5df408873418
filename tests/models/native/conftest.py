from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def small_deepseek() -> Path:
    """Folder of the small trained DeepSeek-V3.2; its README says how it was made."""
    return ROOT / "tests" / "data" / "small_deepseek_v32"


@pytest.fixture(scope="session")
def some_text(small_deepseek: Path) -> torch.Tensor:
    """Tokens of prose that it was not trained on, int64 `[1, 4096]`: the project's own design document."""
    text = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(small_deepseek)(text, return_tensors="pt", verbose=False)["input_ids"]
    assert ids.shape[1] >= 4096
    return ids[:, :4096]
