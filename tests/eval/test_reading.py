"""One reading: perplexity through any model's own head, decoding, and output that is not finite."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from dsa.eval import reading
from dsa.eval.reading import negative_log_likelihood, read
from dsa.testing.tiny_models import ONE_OF_EACH_KIND, tiny_model, tiny_tokens


@pytest.mark.parametrize("model_type", ONE_OF_EACH_KIND)
def test_perplexity_through_every_head(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # a few rows at a time, so that chunks have an odd last one
    monkeypatch.setattr(reading, "LOGITS_AT_ONCE", 7 * 97)
    model, ids = tiny_model(model_type), tiny_tokens(1, 50)
    result = read(model, ids, start=19)
    with torch.no_grad():
        logits = model(ids).logits[0, 19:-1].double()
    assert result.evaluated == 30
    assert result.perplexity == pytest.approx(math.exp(F.cross_entropy(logits, ids[0, 20:])), rel=1e-5)
    assert "forward" not in vars(model.base_model)


def test_the_likelihood_is_exact_over_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(8, 50_000) * 3, torch.randint(0, 50_000, (8,))
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(negative_log_likelihood(logits, targets), exact, atol=2e-6, rtol=0)


def test_the_continuation_is_generate_s() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 40)
    result = read(model, ids, start=0, new_tokens=9)
    expected = model.generate(ids, max_new_tokens=9, min_new_tokens=9, do_sample=False, eos_token_id=-1)
    assert result.continuation == expected[0, 40:].tolist()
    assert result.decode_tokens_per_s is not None
    assert result.prefill_s > 0


@pytest.mark.parametrize(("new_tokens", "made"), [(0, 0), (1, 1)])
def test_too_few_tokens_to_time(new_tokens: int, made: int) -> None:
    result = read(tiny_model("llama"), tiny_tokens(1, 10), start=0, new_tokens=new_tokens)
    assert len(result.continuation) == made
    assert result.decode_tokens_per_s is None


@pytest.mark.parametrize("start", [-1, 9, 10])
def test_nothing_to_evaluate(start: int) -> None:
    with pytest.raises(ValueError, match=f"start must lie in 0 to 8 for 10 tokens, got {start}"):
        read(tiny_model("llama"), tiny_tokens(1, 10), start=start)


def test_output_that_is_not_finite() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"output for this text is not finite \(seen among positions 3 to 10\)"):
        read(model, tiny_tokens(1, 12), start=3)


def test_progress_counts_layers_and_tokens() -> None:
    steps: list[tuple[str, int, int]] = []

    @contextmanager
    def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
        done: list[None] = []
        yield lambda: done.append(None)
        steps.append((label, total, len(done)))

    model = tiny_model("llama")
    read(model, tiny_tokens(1, 20), start=0, new_tokens=5, label="x", progress=progress)
    assert steps == [("x: prefill", 2, 2), ("x: perplexity", 1, 1), ("x: decode", 4, 4)]
    assert not model.model.layers[0]._forward_hooks
