"""The window baseline: which tokens it reads, in blocks of any size, in every kind of model."""

import pytest
import torch

from dsa.eval import window
from dsa.eval.mass import MassObserver
from dsa.eval.window import attend_to_window, sinks_and_recent, window_attention
from dsa.models import attach, detach
from dsa.models.context import AttentionCall, DSAContext
from dsa.testing.tiny_models import ONE_OF_EACH_KIND, TINY_CONFIG, tiny_model, tiny_tokens


@pytest.mark.parametrize("top_k", [1, 2, 4, 5, 9, 33, 60])
@pytest.mark.parametrize("queries", [1, 13, 37])
def test_against_a_mask(top_k: int, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "QUERIES_AT_A_TIME", 5)
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 37, 8), torch.randn(2, 2, 37, 6)
    sinks, recent = sinks_and_recent(top_k)
    last, position = torch.arange(37 - queries, 37)[:, None], torch.arange(37)
    mask = (position <= last) & ((position < sinks) | (position > last - recent))
    assert int(mask.sum(dim=1).max()) <= top_k
    sinks_logits = torch.randn(4)
    scores = 5.0 * torch.tanh(torch.einsum("bhtd,bhsd->bhts", query, key.repeat_interleave(2, 1)) * 0.3 / 5.0)
    scores = scores.masked_fill(~mask, float("-inf"))
    with_sink = torch.cat((scores, sinks_logits.view(1, 4, 1, 1).expand(2, 4, queries, 1)), dim=-1)
    expected = with_sink.softmax(dim=-1)[..., :-1] @ value.repeat_interleave(2, 1)
    result = attend_to_window(query, key, value, top_k, 0.3, softcap=5.0, sink_logits=sinks_logits)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)


def select_window(call: AttentionCall) -> torch.Tensor:
    """The same tokens as indices, for the attached model."""
    sinks, recent = sinks_and_recent(TINY_CONFIG.top_k)
    ends = call.key_end[..., None]
    positions = torch.arange(call.key.shape[1])
    chosen = (positions < ends) & ((positions < sinks) | (positions >= ends - recent))
    ranked = torch.where(chosen, positions, call.key.shape[1]).sort(dim=-1).values[..., : TINY_CONFIG.top_k]
    return torch.where(ranked < call.key.shape[1], ranked, -1).int()


@pytest.mark.parametrize("model_type", ONE_OF_EACH_KIND)
def test_in_every_family(model_type: str) -> None:
    model, ids = tiny_model(model_type), tiny_tokens(1, 45)
    own = model.config._attn_implementation
    report = attach(model, TINY_CONFIG)
    with torch.no_grad():
        expected = model(ids, dsa_context=DSAContext(select=select_window)).logits
        detach(model)
        before = model(ids).logits
        with window_attention(model, {row.layer: row.top_k for row in report.layers if row.top_k is not None}):
            result = model(ids).logits
        after = model(ids).logits
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(before, after)
    assert not torch.allclose(before, result)
    assert model.config._attn_implementation == own


def test_decoding_reads_the_same_window() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 30)
    with torch.no_grad(), window_attention(model, {0: 8, 1: 8}):
        whole = model(ids).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        step = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)


def test_mass_is_one_where_everything_is_selected() -> None:
    model, ids = tiny_model("gemma2"), tiny_tokens(1, 30)
    config = TINY_CONFIG.replace(top_k=30)
    attach(model, config)
    observer = MassObserver(config, start=10)
    with torch.no_grad():
        model(ids, use_cache=False, dsa_context=DSAContext(mode="dense", observer=observer))
    assert [row.layer for row in observer.layers] == [1]
    row = observer.layers[0]
    assert (row.dsa, row.window, row.oracle) == pytest.approx((1.0, 1.0, 1.0))
    assert (row.tokens_mean, row.tokens_max) == (20.5, 30)
