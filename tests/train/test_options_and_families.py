"""Options of the sparse stage and families of models are a matrix: each option on each kind of attention."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa.models import report_of
from dsa.testing.tiny_models import ONE_OF_EACH_KIND
from dsa.testing.training import attached, random_tokens
from dsa.train import SparseSettings, train_sparse

OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"mixed_precision": "bf16"},
    "bf16, recomputed": {"mixed_precision": "bf16", "gradient_checkpointing": True},
    "bf16, distilled": {"mixed_precision": "bf16", "distill": 1.0},
    "bf16, adapters": {"mixed_precision": "bf16", "all_parameters": False, "lora": 4},
    "recomputed, few queries": {"gradient_checkpointing": True, "queries_per_update": 8},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model_type", ONE_OF_EACH_KIND)
def test_a_step_of_the_sparse_stage(model_type: str, options: str, tmp_path: Path) -> None:
    model = attached(model_type)
    assert not report_of(model).trained
    settings = SparseSettings(**{"steps": 1, "seq_len": 32, "all_parameters": True, "lr": 1e-3, **OPTIONS[options]})
    result = train_sparse(model, random_tokens(2000), tmp_path / "run", settings)
    assert result.step == 1
    assert all(math.isfinite(kl) for kl in result.kl.values())
    assert result.language is not None
    assert math.isfinite(result.language)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert report_of(model).trained
