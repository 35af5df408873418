"""Gradient checkpointing runs layers again, last one first: shared selections must still be there.

With `use_reentrant=True` a layer runs first without gradients, as it does in inference, and again in the backward pass.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import dsa
from dsa.models import layer
from dsa.models.latent import attention as latent_attention
from dsa.testing.born_with_dsa import born_model
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens

SHARING = {1: {"share": 0}, 2: {"share": 0}}


def attached() -> PreTrainedModel:
    model = tiny_model("llama", num_hidden_layers=4).double()
    dsa.attach(model, TINY_CONFIG, layers=SHARING)
    return model


def latent() -> PreTrainedModel:
    model = tiny_model("deepseek_v3", num_hidden_layers=4).double()
    dsa.attach(model, top_k=8, index_heads=4, index_head_dim=16, layers=SHARING)
    return model


def accelerated() -> PreTrainedModel:
    model = born_model("glm_moe_dsa", num_hidden_layers=4, indexer_types=["full", "shared", "shared", "full"]).double()
    dsa.accelerate(model)
    return model


@pytest.fixture(params=[attached, latent, accelerated], ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = request.param()
    return made.train()


def gradients(model: PreTrainedModel, run: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    run(tiny_tokens(2, 24)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model: PreTrainedModel, **given: object) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tokens: model(tokens, labels=tokens, use_cache=False, **given).loss


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_gradients_are_the_same(
    model: PreTrainedModel, reentrant: bool, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients(model, loss_of(model))
    if blocks:
        # Without gradients a layer works through its queries in blocks, with gradients it does not.
        monkeypatch.setattr(layer, "QUERIES_AT_A_TIME", 5)
        monkeypatch.setattr(latent_attention, "QUERY_BYTES", 1 << 13)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal(gradients(model, loss_of(model)), expected)


def test_a_context_made_without_gradients(model: PreTrainedModel) -> None:
    expected = gradients(model, loss_of(model))
    with torch.no_grad():
        context = dsa.DSAContext()
        model(tiny_tokens(2, 24), dsa_context=context)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert_equal(gradients(model, loss_of(model, dsa_context=context)), expected)


def test_the_whole_decoder_as_one_checkpoint(model: PreTrainedModel) -> None:
    """It then begins without gradients, and begins again."""
    expected = gradients(model, loss_of(model))
    loss = loss_of(model, dsa_context=dsa.DSAContext())
    anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def whole(tokens: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda tokens, anchor: loss(tokens) + 0 * anchor, tokens, anchor, use_reentrant=True)

    assert_equal(gradients(model, whole), expected)


def test_a_selection_is_kept_no_longer_than_it_is_read(model: PreTrainedModel) -> None:
    """Inference over a long prompt holds one selection at a time; a pass with gradients keeps them with its context."""
    context, held = dsa.DSAContext(), []
    layers: nn.ModuleList = model.model.layers
    for each in layers:
        each.register_forward_hook(lambda *_: held.append(sorted(context.indices)))
    with torch.no_grad():
        model(tiny_tokens(1, 30), dsa_context=context)
    assert held[:3] == [[0], [0], []]
    model(tiny_tokens(1, 30), dsa_context=context)
    assert 0 in context.indices
