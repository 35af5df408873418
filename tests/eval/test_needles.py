"""Needles: planted where they should be, asked for one by one, and compared cell by cell."""

import math
import random

import pytest
import torch

import dsa
from dsa.eval.comparison import contexts
from dsa.eval.interval import mean_interval, student_95
from dsa.eval.needles import DEPTHS, Haystack, Reply, ask, cells, make_haystack, make_needles
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

TEXT = "It was a quiet day, and nothing much went on anywhere. Nobody minded that at all! " * 60
LENGTH = 2000


def haystack(seed: int = 0) -> Haystack:
    tokenizer = tiny_tokenizer()
    return make_haystack(tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer, LENGTH, seed)


def test_ten_needles_about_ten_things() -> None:
    needles = make_needles(random.Random(1))
    assert len({needle.question.split(" of ")[0] for needle in needles}) == DEPTHS
    for needle in needles:
        asked = needle.question.split("Answer: ")[1]
        assert needle.sentence.strip() == f"{asked}{needle.answer}."
        assert needle.answer.strip().isdigit()


def test_a_needle_in_every_tenth() -> None:
    tokenizer, found = tiny_tokenizer(), haystack()
    longest = max(len(q) + len(a) for q, a in zip(found.questions, found.answers, strict=True))
    assert found.ids.shape == (1, LENGTH - longest)
    rest = text = tokenizer.decode(found.ids[0])
    total, behind_sentences = found.ids.shape[1], 0
    for depth, (place, needle) in enumerate(zip(found.places, found.needles, strict=True)):
        assert text[place:].startswith(needle.sentence)
        # the other needles shift places a little
        assert depth / DEPTHS - 0.05 <= place / total <= (depth + 1) / DEPTHS + 0.05
        behind_sentences += text[place - 1] in ".!"
        rest = rest.replace(needle.sentence, "")
    assert rest in TEXT
    # a tenth of so short a text does not always have another sentence's end
    assert behind_sentences >= 7


def test_a_seed_makes_the_same_haystack() -> None:
    first, again, other = haystack(), haystack(), haystack(1)
    assert torch.equal(first.ids, again.ids)
    assert first.needles == again.needles
    assert first.needles != other.needles
    assert first.places != other.places


def test_no_room() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match="length must leave room for 10 needles and a question, got 300"):
        make_haystack(ids, tokenizer, 300, 0)
    with pytest.raises(ValueError, match="a haystack of 50,000 tokens needs a text of"):
        make_haystack(ids, tokenizer, 50_000, 0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("reader", ["dense", "dsa", "window"])
def test_each_question_is_asked_as_if_alone(reader: str, family: str) -> None:
    model = tiny_model(family, vocab_size=BYTE_VOCABULARY, max_position_embeddings=LENGTH)
    config = TINY_CONFIG.replace(index_dtype="fp32")
    dsa.attach(model, config)
    hay = haystack()
    replies = ask(model, hay, contexts(reader, config))
    assert len(replies) == DEPTHS
    for depth in (0, 9):
        question, answer = hay.questions[depth], hay.answers[depth]
        ids = torch.cat((hay.ids, torch.tensor([[*question, *answer]])), dim=1)
        with torch.no_grad():
            logits = model(ids, dsa_context=contexts(reader, config)()).logits[0, -len(answer) - 1 : -1]
        wanted = torch.tensor(answer)
        expected = logits.double().log_softmax(dim=-1).gather(1, wanted[:, None]).sum()
        assert replies[depth].log_probability == pytest.approx(float(expected), abs=1e-3)
        assert replies[depth].tokens == len(answer)
        assert replies[depth].found == bool((logits.argmax(dim=-1) == wanted).all())


def test_output_that_is_not_finite() -> None:
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY, max_position_embeddings=LENGTH)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    dsa.attach(model, TINY_CONFIG)
    with pytest.raises(ValueError, match="output for a question is not finite"):
        ask(model, haystack(), contexts("dense", TINY_CONFIG))


def replies(values: list[float], found: list[bool]) -> list[Reply]:
    """Replies to ten questions, of which the first few are given."""
    rest = DEPTHS - len(values)
    log_probabilities = [*values, *[0.0] * rest]
    return [
        Reply(*each, found=hit) for each, hit in zip(((v, 2) for v in log_probabilities), [*found, *[False] * rest])
    ]


def test_cells_by_hand() -> None:
    haystacks = [
        {"dense": replies([-1.0, -1.0], [True, True]), "dsa": replies([-1.5, -1.0], [True, True])},
        {"dense": replies([-2.0, -9.0], [True, False]), "dsa": replies([-2.7, -1.0], [False, True])},
        {"dense": replies([-3.0, -9.0], [True, False]), "dsa": replies([-3.6, -1.0], [True, False])},
    ]
    first, second, *others, together = cells(64, haystacks, "dsa")
    assert (first.length, first.depth, first.asked, first.compared) == (64, 0, 3, 3)
    assert first.difference == pytest.approx(-0.6)
    assert first.difference_per_token == pytest.approx(-0.3)
    assert first.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert first.found == pytest.approx(2 / 3)
    assert first.found_dense == 1.0
    assert first.is_lower
    assert (second.compared, second.difference, second.half_width) == (1, 0.0, None)
    assert not second.is_lower
    assert all(cell.difference is None and not cell.is_lower and cell.asked == 3 for cell in others)
    # a haystack's mean is one observation: -0.25, -0.7, -0.6
    assert (together.depth, together.asked, together.compared) == (None, 30, 4)
    assert together.difference == pytest.approx(-1.55 / 3)
    assert together.is_lower is (together.difference + together.half_width < 0)


def test_intervals() -> None:
    assert mean_interval([3.0]) == (3.0, None)
    mean, half = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(3.182 * math.sqrt(5 / 3) / 2)
    assert student_95(31) == pytest.approx(2.0395, abs=5e-4)
    assert student_95(100) == pytest.approx(1.9840, abs=5e-4)
    assert student_95(10**6) == pytest.approx(1.95996, abs=1e-4)
