"""Readers of one text on one attached model: dense, DSA and the selections, whole and in chunks."""

import pytest
import torch
import torch.nn.functional as F

import dsa
from dsa.eval import comparison
from dsa.eval.comparison import READERS, attached, budget, contexts, text_losses
from dsa.models.attached import is_attached
from dsa.models.attachment import take_off
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens

CONFIG = TINY_CONFIG.replace(index_dtype="fp32")


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "random"])
def test_chunks_do_not_show(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 50)
    dsa.attach(model, CONFIG)
    whole = text_losses(model, ids, 20, contexts(reader, CONFIG))
    monkeypatch.setattr(comparison, "CHUNK", 16)
    torch.testing.assert_close(text_losses(model, ids, 20, contexts(reader, CONFIG)), whole, atol=1e-4, rtol=1e-4)
    assert whole.shape == (29,)


def test_dense_is_the_model_before_it_was_attached() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 50)
    with torch.no_grad():
        plain = F.cross_entropy(model(ids).logits[0, 20:-1].double(), ids[0, 21:], reduction="none")
    dsa.attach(model, CONFIG)
    dense = text_losses(model, ids, 20, contexts("dense", CONFIG))
    torch.testing.assert_close(dense, plain, atol=1e-5, rtol=1e-5)
    for reader in READERS[1:]:
        assert not torch.allclose(text_losses(model, ids, 20, contexts(reader, CONFIG)), plain)


def test_dsa_is_the_attached_model() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 50)
    dsa.attach(model, CONFIG)
    with torch.no_grad():
        own = F.cross_entropy(model(ids).logits[0, 20:-1].double(), ids[0, 21:], reduction="none")
    torch.testing.assert_close(text_losses(model, ids, 20, contexts("dsa", CONFIG)), own, atol=1e-5, rtol=1e-5)


def test_a_budget_is_put_on_and_taken_off() -> None:
    model = tiny_model("llama")
    dsa.attach(model, dsa.DSAConfig(top_k=300, local=100, index_heads=2, index_head_dim=8))
    taken = take_off(model)
    with attached(model, taken, budget(taken.config, 120, dense=[0])) as config:
        assert (config.top_k, config.local) == (120, 60)
        assert [config.is_dense(layer) for layer in (0, 1)] == [True, False]
    assert not is_attached(model)
    assert budget(taken.config, 1000) == {"top_k": 1000, "local": 100}
    assert budget(taken.config, 120, local=7) == {"top_k": 120, "local": 7}
