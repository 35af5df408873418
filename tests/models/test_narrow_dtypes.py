"""Narrow dtypes on every family: autocast and bf16 weights, forward, backward and with a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import dsa
from dsa.models.families import BORN_WITH_DSA
from dsa.testing.born_with_dsa import born_model
from dsa.testing.tiny_models import ONE_OF_EACH_KIND, TINY_CONFIG, tiny_model, tiny_tokens

TOKENS = tiny_tokens(2, 40)


def made(model_type: str, **budget: int) -> PreTrainedModel:
    """A model of that family that runs sparse; the same weights every time."""
    if model_type in BORN_WITH_DSA:
        model = born_model(model_type)
        dsa.accelerate(model, **budget)
        return model
    model = tiny_model(model_type)
    torch.manual_seed(0)
    dsa.attach(model, TINY_CONFIG.replace(**budget), dense_shortcut=not budget)
    return model


def difference(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the median token, relative: a router that rounds chooses other experts for some."""
    return float(((logits - exact).norm(dim=-1) / exact.norm(dim=-1)).median())


@pytest.mark.parametrize("model_type", [*ONE_OF_EACH_KIND, *BORN_WITH_DSA])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model_type: str, dtype: torch.dtype) -> None:
    """Close to fp32 where everything is read; where it is not, it runs with gradients everywhere, and with a cache."""
    model = made(model_type, top_k=64)
    with torch.no_grad():
        exact = model(TOKENS).logits
        with torch.autocast("cpu", dtype):
            narrow = model(TOKENS).logits.float()
    assert difference(narrow, exact) < 0.1
    model = made(model_type)
    with torch.autocast("cpu", dtype):
        loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if ".indexer." not in name and parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
    with torch.no_grad(), torch.autocast("cpu", dtype):
        whole = model(TOKENS).logits[:, -1].float()
        cache = DynamicCache(config=model.config)
        for begin, stop in ((0, 25), (25, 39), (39, 40)):
            step = model(TOKENS[:, begin:stop], past_key_values=cache).logits[:, -1].float()
    assert step.isfinite().all()
    assert difference(step, whole) < 0.3


@pytest.mark.parametrize("model_type", [*ONE_OF_EACH_KIND, *BORN_WITH_DSA])
def test_bf16_weights(model_type: str) -> None:
    model = made(model_type, top_k=64)
    narrow = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        exact, found = model(TOKENS).logits, narrow(TOKENS).logits.float()
    assert difference(found, exact) < 0.1
    model = made(model_type).bfloat16()
    out = model.generate(TOKENS[:1], max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(TOKENS[:1]))
    assert out.shape[1] > TOKENS.shape[1]
