from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def small_deepseek() -> Path:
    """Folder of the small trained DeepSeek-V3.2; its README says how it was made."""
    return Path(__file__).parents[2] / "data" / "small_deepseek_v32"


@pytest.fixture(scope="session")
def some_text(small_deepseek: Path) -> torch.Tensor:
    """Tokens of prose that it was not trained on, int64 `[1, 1536]`."""
    text = (small_deepseek / "text.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(small_deepseek)(text, return_tensors="pt", verbose=False)["input_ids"]
    return ids[:, :1536]
