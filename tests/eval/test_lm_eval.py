"""EleutherAI's lm-eval on attached models, through its own wrapper: batches and padding change nothing."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dsa.models import attach, detach
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dsa-attention[lm-eval]'")

# Of different lengths, so that every batch is padded; each longer than the budget of `TINY_CONFIG`.
CONTEXTS = (
    "A ferry left at noon.",
    "Nobody had seen the green suitcase since the harbour master went to lunch.",
    "It rained, and the goat stood under the quince tree, looking at the house.",
    "Eleven sails, and a whale.",
    "The clock in the hall strikes the hours only, since nobody can bear the quarters; so it was decided.",
)
CONTINUATIONS = (" Then it came.", " It was gone.", " So", " What else?", " Yes, and no.")


@pytest.fixture(params=["llama", "gemma3_text"])
def attached(request: pytest.FixtureRequest) -> Any:
    model = tiny_model(request.param, vocab_size=BYTE_VOCABULARY)
    attach(model, TINY_CONFIG)
    return model


def wrapped(model: Any, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=batch_size)


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]  # type: ignore[arg-type]


def log_likelihoods(model: Any, batch_size: int) -> list[float]:
    pairs = list(zip(CONTEXTS, CONTINUATIONS, strict=True))
    found = wrapped(model, batch_size).loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    return [value for value, _ in found]


def test_log_likelihoods_are_the_attached_model_s(attached: Any) -> None:
    together = log_likelihoods(attached, 4)
    assert together == pytest.approx(log_likelihoods(attached, 1), abs=1e-3)
    tokenizer = tiny_tokenizer()
    for context, continuation, value in zip(CONTEXTS, CONTINUATIONS, together, strict=True):
        ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        wanted = ids[0, -len(continuation) :]
        with torch.no_grad():
            logits = attached(ids).logits[0, -len(continuation) - 1 : -1]
        expected = logits.log_softmax(dim=-1).gather(1, wanted[:, None]).sum()
        assert value == pytest.approx(float(expected), abs=1e-3)
    detach(attached)
    assert together != pytest.approx(log_likelihoods(attached, 4), abs=1e-2)


def test_left_padding_leaves_continuations_alone(attached: Any) -> None:
    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = [(context, options) for context in CONTEXTS]
    made = {
        size: wrapped(attached, size).generate_until(requests("generate_until", asked), disable_tqdm=True)
        for size in (1, 4)
    }
    assert made[1] == made[4]
    tokenizer = tiny_tokenizer()
    for context, continuation in zip(CONTEXTS, made[4], strict=True):
        ids = tokenizer(context, return_tensors="pt")["input_ids"]
        own = attached.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(own[0, ids.shape[1] :], skip_special_tokens=True)
        assert text.startswith(continuation)
