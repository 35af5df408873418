"""Needles: planted where they should be, asked for one by one, and compared cell by cell."""

import math
import random

import pytest
import torch

import dsa
from dsa.eval.comparison import contexts
from dsa.eval.interval import mean_interval, student_95
from dsa.eval.needle_cells import cells
from dsa.eval.needle_kinds import DEPTHS, KINDS, make_needles
from dsa.eval.needles import Haystack, Reply, ask, make_haystack
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

TEXT = "It was a quiet day, and nothing much went on anywhere. Nobody minded that at all! " * 60
LENGTH = 2000
LONGER = 3600
"""Room for needles of several sentences, of one token a byte."""


def haystack(seed: int = 0, kind: str = "single") -> Haystack:
    tokenizer = tiny_tokenizer()
    length = LENGTH if kind in ("single", "multi-key") else LONGER
    return make_haystack(tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer, length, seed, kind)


def test_ten_needles_about_ten_things() -> None:
    needles = make_needles(random.Random(1))
    assert len({subject(needle.prompts[0]) for needle in needles}) == DEPTHS
    for needle in needles:
        (sentence,), (prompt,), (answer,) = needle.sentences, needle.prompts, needle.answers
        assert sentence.strip() == f"{prompt.split('Answer: ')[1]}{answer}."
        assert answer.strip().isdigit()


def subject(question: str) -> str:
    """What a question is about, without whose it is."""
    return question.split(" of ")[0]


def test_keys_of_one_kind() -> None:
    needles = make_needles(random.Random(1), "multi-key")
    assert len({subject(needle.prompts[0]) for needle in needles}) == 1
    assert len({needle.prompts[0] for needle in needles}) == DEPTHS


def test_several_values_of_one_key() -> None:
    for needle in make_needles(random.Random(1), "multi-value"):
        assert len(needle.sentences) == len(needle.prompts) == len(needle.answers) == 3
        whole = "".join(text for pair in zip(needle.prompts, needle.answers, strict=True) for text in pair)
        for sentence in needle.sentences:
            assert sentence.strip().removesuffix(".").lower() in whole.lower()


def test_a_chain_leads_back_to_the_number() -> None:
    needles = make_needles(random.Random(1), "variable-tracking")
    assigned = dict(
        sentence.strip().removeprefix("Let ").removesuffix(".").split(" = ")
        for needle in needles
        for sentence in needle.sentences
    )
    assert len(assigned) == 3 * DEPTHS
    for needle in needles:
        name = needle.prompts[0].split("Answer: ")[1].removesuffix(" =")
        for answer in needle.answers:
            assert assigned[name] == answer.strip()
            name = assigned[name]
        assert name.isdigit()


def test_unknown_kinds() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of single, multi-key, .*, got 'many'"):
        make_needles(random.Random(1), "many")


@pytest.mark.parametrize("kind", KINDS)
def test_a_needle_from_every_tenth_on(kind: str) -> None:
    tokenizer, found = tiny_tokenizer(), haystack(kind=kind)
    asked = [sum(map(len, [*prompt, *answer])) for prompt, answer in zip(found.prompts, found.answers, strict=True)]
    assert found.ids.shape == (1, found.length - max(asked))
    rest = text = tokenizer.decode(found.ids[0])
    planted = sorted(place for places in found.places for place in places)
    sizes = {place: len(s) for p, n in zip(found.places, found.needles) for place, s in zip(p, n.sentences)}
    behind_sentences = 0
    for depth, (places, needle) in enumerate(zip(found.places, found.needles, strict=True)):
        assert list(places) == sorted(places)
        for place, sentence in zip(places, needle.sentences, strict=True):
            assert text[place:].startswith(sentence)
            behind_sentences += text[place - 1] in ".!\n"
            rest = rest.replace(sentence, "")
        # where it lies in the text without the needles before it, which is at most a sentence off
        before = sum(sizes[place] for place in planted if place < places[0])
        share = (places[0] - before) / (found.ids.shape[1] - sum(sizes.values()))
        assert depth / DEPTHS <= share <= (depth + 1) / DEPTHS + 0.06
    assert rest in TEXT
    # a tenth of so short a text does not always have another sentence's end
    assert behind_sentences >= 0.7 * len(planted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_makes_the_same_haystack(kind: str) -> None:
    first, again, other = haystack(0, kind), haystack(0, kind), haystack(1, kind)
    assert torch.equal(first.ids, again.ids)
    assert first.needles == again.needles
    assert first.needles != other.needles
    assert first.places != other.places


def test_no_room() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    with pytest.raises(
        ValueError, match=r"length must leave room for 10 needles \(single\) and a question, .*, got 300"
    ):
        make_haystack(ids, tokenizer, 300, 0)
    with pytest.raises(ValueError, match="a haystack of 50,000 tokens needs a text of"):
        make_haystack(ids, tokenizer, 50_000, 0)


@pytest.mark.parametrize(
    ("family", "reader", "kind"),
    [
        *((family, reader, "single") for family in ("llama", "gemma3_text") for reader in ("dense", "dsa", "window")),
        ("llama", "dsa", "multi-value"),
        ("gemma3_text", "dense", "variable-tracking"),
    ],
)
def test_each_question_is_asked_as_if_alone(family: str, reader: str, kind: str) -> None:
    model = tiny_model(family, vocab_size=BYTE_VOCABULARY, max_position_embeddings=LONGER)
    config = TINY_CONFIG.replace(index_dtype="fp32")
    dsa.attach(model, config)
    hay = haystack(kind=kind)
    replies = ask(model, hay, contexts(reader, config))
    parts = len(hay.answers[0])
    assert [reply.depth for reply in replies] == [depth for depth in range(DEPTHS) for _ in range(parts)]
    for depth in (0, 9):
        ids = hay.ids
        for part, (prompt, answer) in enumerate(zip(hay.prompts[depth], hay.answers[depth], strict=True)):
            ids = torch.cat((ids, torch.tensor([[*prompt, *answer]])), dim=1)
            with torch.no_grad():
                logits = model(ids, dsa_context=contexts(reader, config)()).logits[0, -len(answer) - 1 : -1]
            wanted = torch.tensor(answer)
            expected = logits.double().log_softmax(dim=-1).gather(1, wanted[:, None]).sum()
            reply = replies[depth * parts + part]
            assert reply.log_probability == pytest.approx(float(expected), abs=1e-3)
            assert reply.tokens == len(answer)
            assert reply.found == bool((logits.argmax(dim=-1) == wanted).all())


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
    hits = [*found, *[False] * rest]
    return [Reply(depth, *each, 2, hit) for depth, (*each, hit) in enumerate(zip(log_probabilities, hits, strict=True))]


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
    assert first.found_half_width == pytest.approx(4.303 * math.sqrt(1 / 3) / math.sqrt(3))
    assert first.found_dense == 1.0
    assert first.log_probability == pytest.approx((-1.5 - 2.7 - 3.6) / 3)
    assert first.log_probability_dense == -2.0
    assert first.is_lower
    assert (second.compared, second.difference, second.half_width) == (1, 0.0, None)
    assert not second.is_lower
    assert all(cell.difference is None and not cell.is_lower and cell.asked == 3 for cell in others)
    # a haystack's mean is one observation: -0.25, -0.7, -0.6
    assert (together.depth, together.asked, together.compared) == (None, 30, 4)
    assert together.difference == pytest.approx(-1.55 / 3)
    assert together.is_lower is (together.difference + together.half_width < 0)


def test_parts_are_counted_one_by_one() -> None:
    dense = [
        Reply(0, -1.0, 2, True),
        Reply(0, -2.0, 3, False),
        *(Reply(depth, 0.0, 1, False) for depth in range(1, 10)),
    ]
    own = [Reply(each.depth, each.log_probability - 1, each.tokens, True) for each in dense]
    first, *_, together = cells(64, [{"dense": dense, "dsa": own}], "dsa")
    assert (first.asked, first.compared, first.found, first.found_dense) == (2, 1, 1.0, 0.5)
    assert (first.difference, first.half_width, first.found_half_width) == (-1.0, None, None)
    assert together.asked == 11


def test_intervals() -> None:
    assert mean_interval([3.0]) == (3.0, None)
    mean, half = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(3.182 * math.sqrt(5 / 3) / 2)
    assert student_95(31) == pytest.approx(2.0395, abs=5e-4)
    assert student_95(100) == pytest.approx(1.9840, abs=5e-4)
    assert student_95(10**6) == pytest.approx(1.95996, abs=1e-4)
