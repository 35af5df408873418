"""One layer alone: forwards that begin in the middle, and the divergence they are judged by."""

import pytest
import torch

import dsa
from dsa.calibrate.effects import compared_positions, divergence, recording, resumed
from dsa.models.decoder import decoder_output, head_logits
from dsa.testing.tiny_models import ONE_OF_EACH_KIND, TINY_CONFIG, tiny_model, tiny_tokens


def decoded(model, ids, **options):
    with torch.no_grad(), decoder_output(model) as captured:
        model(ids, use_cache=False, **options)
    return captured[0]


@pytest.mark.parametrize("model_type", ONE_OF_EACH_KIND)
def test_a_forward_from_the_last_layer_on(model_type: str) -> None:
    model, ids = tiny_model(model_type), tiny_tokens(1, 40)
    layers = model.config.get_text_config().num_hidden_layers
    outputs: list = []
    with recording(model, outputs):
        dense = decoded(model, ids)
    assert len(outputs) == layers
    full = next(n for n in reversed(range(layers)) if _is_full(model, n))
    alone = {layer: {"dense": True} for layer in range(layers) if layer != full}
    dsa.attach(model, TINY_CONFIG, layers=alone)
    expected = decoded(model, ids)
    with resumed(model, outputs[:full], full):
        found = decoded(model, ids)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.last_hidden_state, dense.last_hidden_state, atol=1e-3)
    dsa.detach(model)
    assert torch.equal(decoded(model, ids).last_hidden_state, dense.last_hidden_state)


def _is_full(model, layer: int) -> bool:
    from dsa.models.families import full_attention_layers

    return full_attention_layers(model.config)[layer]


def test_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("gemma2"), tiny_tokens(1, 30)
    dense, other = decoded(model, ids), decoded(model, ids)
    positions = compared_positions(15, 30)
    assert positions.tolist() == list(range(15, 29))
    assert divergence(model, dense, other, ids, positions) == pytest.approx(0.0, abs=1e-6)
    other.last_hidden_state = other.last_hidden_state * 1.1
    with torch.no_grad():
        expected = model(ids).logits[0, positions].double().log_softmax(dim=-1)
        found = head_logits(model, other, other.last_hidden_state, ids)[0, positions].double()
    exact = torch.nn.functional.kl_div(found.log_softmax(dim=-1), expected, log_target=True, reduction="none")
    assert divergence(model, dense, other, ids, positions) == pytest.approx(float(exact.sum(1).mean()), rel=1e-4)
    # a few rows at a time, so that chunks have an odd last one
    monkeypatch.setattr("dsa.calibrate.effects.LOGITS_AT_ONCE", 5 * 97)
    assert divergence(model, dense, other, ids, positions) == pytest.approx(float(exact.sum(1).mean()), rel=1e-4)


def test_compared_positions() -> None:
    assert compared_positions(0, 2).tolist() == [0]
    assert len(compared_positions(4096, 8192)) == 1024
    assert compared_positions(4096, 8192)[-1] == 8190
