"""One table of tests for every family: what attaching must keep, and that a cache changes nothing."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dsa
from dsa.models.attached import indexers_of, report_of
from dsa.models.decoder import decoder_of
from dsa.models.families import ATTACHABLE, full_attention_layers
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens

TOKENS = 37


@pytest.fixture(params=sorted(ATTACHABLE))
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    # fp64, so that rounding does not blur what a test compares.
    return tiny_model(request.param).double()


def logits(model: torch.nn.Module, tokens: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **kwargs).logits


@pytest.mark.parametrize("dense_shortcut", [True, False])
def test_reading_everything_equals_dense(model: torch.nn.Module, dense_shortcut: bool) -> None:
    tokens = tiny_tokens(2, TOKENS)
    dense = logits(model, tokens)
    dsa.attach(model, TINY_CONFIG, top_k=TOKENS, dense_shortcut=dense_shortcut)
    torch.testing.assert_close(logits(model, tokens), dense, atol=1e-4, rtol=0)


def test_small_budget_changes_the_output(model: torch.nn.Module) -> None:
    tokens = tiny_tokens(1, TOKENS)
    dense = logits(model, tokens)
    dsa.attach(model, TINY_CONFIG)
    assert (logits(model, tokens) - dense).abs().max() > 1e-3


def test_cached_equals_uncached(model: torch.nn.Module) -> None:
    tokens = tiny_tokens(2, TOKENS)
    dsa.attach(model, TINY_CONFIG)
    whole = logits(model, tokens, use_cache=False)
    with torch.no_grad():
        cache = None
        parts = []
        for begin, stop in [(0, 19), (19, 30), (30, 31), (31, 32), (32, TOKENS)]:
            output = model(tokens[:, begin:stop], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: torch.nn.Module, side: str) -> None:
    tokens = tiny_tokens(1, TOKENS)
    padding, mask = torch.zeros(1, 9, dtype=torch.long), torch.ones(1, TOKENS, dtype=torch.long)
    parts = [(padding, torch.zeros_like(padding)), (tokens, mask)]
    if side == "right":
        parts.reverse()
    padded, attention_mask = (torch.cat(column, dim=1) for column in zip(*parts))
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    dsa.attach(model, TINY_CONFIG)
    alone = logits(model, tokens, attention_mask=torch.ones_like(tokens))
    together = logits(model, padded, attention_mask=attention_mask, position_ids=positions)
    real = together[:, 9:] if side == "left" else together[:, :TOKENS]
    torch.testing.assert_close(real, alone, atol=1e-5, rtol=0)


def test_detaching_restores_the_model(model: torch.nn.Module) -> None:
    tokens = tiny_tokens(1, TOKENS)
    before, cls, config_cls = logits(model, tokens), type(model), type(model.config)
    names, plain = list(model.state_dict()), model.config.to_dict()
    dsa.attach(model, TINY_CONFIG)
    assert dsa.is_attached(model)
    dsa.detach(model)
    assert not dsa.is_attached(model)
    assert (type(model), type(model.config)) == (cls, config_cls)
    assert list(model.state_dict()) == names
    assert model.config.to_dict() == plain
    assert torch.equal(logits(model, tokens), before)


def test_report_names_every_layer(model: torch.nn.Module) -> None:
    full = full_attention_layers(model.config)
    report = dsa.attach(model, TINY_CONFIG)
    assert report is report_of(model)
    assert [row.kind for row in report.layers] == ["sparse" if whole else "sliding" for whole in full]
    assert sorted(indexers_of(model)) == [layer for layer, whole in enumerate(full) if whole]
    assert "UNTRAINED" in str(report)
    assert type(model).__mro__[1].__name__ in str(report)


@pytest.mark.parametrize("model_type", sorted(ATTACHABLE))
def test_saved_and_reloaded_logits_are_identical(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    tokens = tiny_tokens(1, TOKENS)
    dsa.attach(model, TINY_CONFIG)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again.set_experts_implementation("eager")
    assert dsa.is_attached(again)
    assert type(again) is type(model)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_rope_layout_of_the_table_is_the_models(model: torch.nn.Module) -> None:
    family = ATTACHABLE[model.config.model_type]
    decoder = decoder_of(model)
    if family.rope is None:
        assert not hasattr(decoder, "rotary_emb")
        return
    arguments = ("full_attention",) if model.config.model_type == "gemma3_text" else ()
    hidden = torch.zeros(1, 1, 32, dtype=torch.float64)
    made = decoder.rotary_emb(hidden, torch.tensor([[5]]), *arguments)
    angles = (made.real if isinstance(made, torch.Tensor) else made[0]).flatten()
    half = angles.numel() // 2
    layouts = {
        "half": torch.equal(angles[:half], angles[half:]),
        "interleaved": torch.equal(angles[0::2], angles[1::2]),
        "single": angles.unique().numel() == angles.numel(),
    }
    assert [name for name, holds in layouts.items() if holds] == [family.rope]
