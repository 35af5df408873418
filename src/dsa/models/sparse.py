"""Models that run sparse, however they came to: attached, or born with DSA and accelerated."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from dsa.models.attachment import AttachReport, is_attached, report_of
from dsa.models.native.acceleration import accelerate_report_of, is_accelerated


def is_sparse(model: nn.Module) -> bool:
    """Whether this model is attached or accelerated."""
    return is_attached(model) or is_accelerated(model)


def sparse_report_of(model: PreTrainedModel) -> AttachReport:
    """What `attach` or `accelerate` returned for this model. Raises `ValueError` where neither was called."""
    return accelerate_report_of(model) if is_accelerated(model) else report_of(model)
