"""Needles in a haystack: facts planted in a long text, one per tenth of it, and asked for one by one.

A haystack is the user's own text with ten sentences such as "The locker number of Captain Doraki is 80213." in it, all
about different things, with names and numbers made up from a seed. The model reads it once; then each question is put
behind it, with its answer, and the answer's log-probability is read off. So one reading serves ten questions, each as
if it had been the only one: the cache is cropped in between.

What counts is the difference to dense attention where dense attention itself finds the needle, that is, where every
token of the answer is its first choice (its greedy continuation is then the answer).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsa.eval.comparison import ContextMaker, new_cache, read_chunks
from dsa.eval.interval import mean_interval
from dsa.modules.cache import IndexedLayer

DEPTHS = 10

# Ten kinds of things: ten codes of ten archives would ask a small model to tell them apart, not to find them.
_FACTS = (
    ("access code", "the {} archive"),
    ("telephone number", "the {} bakery"),
    ("combination", "the safe in {} castle"),
    ("registration number", "the fishing boat {}"),
    ("serial number", "the {} telescope"),
    ("membership number", "Doctor {}"),
    ("weight in grams", "the {} diamond"),
    ("locker number", "Captain {}"),
    ("catalogue number", "the {} manuscript"),
    ("flight number", "the {} balloon"),
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_DIGITS = 5
_SENTENCE_ENDS = (".", "!", "?", "\n")
_LOOK_AHEAD = 128


@dataclass(frozen=True)
class Needle:
    """A fact and how it is asked for.

    Args:
        sentence: What is planted.
        question: What follows the haystack, up to the answer.
        answer: What is to come then, with the space before it.
    """

    sentence: str
    question: str
    answer: str


def make_needles(generator: random.Random) -> list[Needle]:
    """Ten facts about different things, in random order."""
    needles = []
    for what, where in generator.sample(_FACTS, DEPTHS):
        name = "".join(generator.choice(_CONSONANTS) + generator.choice(_VOWELS) for _ in range(3)).capitalize()
        number = str(generator.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))
        fact = f"{what} of {where.format(name)} is"
        question = f"\n\nQuestion: What is the {fact.removesuffix(' is')}?\nAnswer: The {fact}"
        needles.append(Needle(f"\n\nThe {fact} {number}.\n\n", question, f" {number}"))
    return needles


@dataclass(frozen=True)
class Haystack:
    """A text with needles in it.

    Args:
        ids: int64 `[1, n]`.
        length: `n` and room for the longest question with its answer.
        needles: In the order of the text; needle `d` lies in tenth `d` of it.
        places: Where each begins.
        questions: Their questions' tokens.
        answers: Their answers' tokens.
    """

    ids: torch.Tensor
    length: int
    needles: tuple[Needle, ...]
    places: tuple[int, ...]
    questions: tuple[list[int], ...]
    answers: tuple[list[int], ...]


def make_haystack(tokens: Sequence[int], tokenizer: Any, length: int, seed: int) -> Haystack:
    """Plants ten needles, each at a random place of its tenth, behind the end of a sentence where one is near.

    Args:
        tokens: The text, without special tokens. What is taken begins at a random place.
        tokenizer: Its tokenizer.
        length: Tokens in all, question and answer included.
        seed: Of needles and places.

    Raises:
        ValueError: The length has no room for the needles, or the text is shorter than that.
    """
    generator = random.Random(seed)
    needles = make_needles(generator)

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    sentences = [encoded(needle.sentence) for needle in needles]
    questions = [encoded(needle.question) for needle in needles]
    answers = [encoded(needle.answer) for needle in needles]
    head = list(tokenizer("")["input_ids"])
    asked = max(len(question) + len(answer) for question, answer in zip(questions, answers, strict=True))
    room = length - len(head) - asked - sum(map(len, sentences))
    if room < DEPTHS:
        raise ValueError(f"length must leave room for {DEPTHS} needles and a question, got {length}; ask for more")
    if len(tokens) < room:
        raise ValueError(f"a haystack of {length:,} tokens needs a text of {room:,}, this one has {len(tokens):,}")
    begin = generator.randrange(len(tokens) - room + 1)
    hay = tokens[begin : begin + room]
    ids, places, done = head, [], 0
    for depth, sentence in enumerate(sentences):
        wanted = int((depth + generator.random()) * room / DEPTHS)
        cut = max(done, _behind_sentence(hay, wanted, (depth + 1) * room // DEPTHS, tokenizer))
        ids = [*ids, *hay[done:cut]]
        places.append(len(ids))
        ids, done = [*ids, *sentence], cut
    ids = [*ids, *hay[done:]]
    return Haystack(torch.tensor([ids]), length, tuple(needles), tuple(places), tuple(questions), tuple(answers))


def _behind_sentence(hay: Sequence[int], wanted: int, stop: int, tokenizer: Any) -> int:
    """The first place from `wanted` on, before `stop`, where a sentence ends; `wanted` where none does."""
    for place in range(wanted + 1, min(stop, wanted + _LOOK_AHEAD)):
        if tokenizer.decode([hay[place - 1]]).endswith(_SENTENCE_ENDS):
            return place
    return wanted


@dataclass(frozen=True)
class Reply:
    """What a model made of one question.

    Args:
        log_probability: Of the whole answer, in nats.
        tokens: Its length.
        found: Whether every token of it is the model's first choice.
    """

    log_probability: float
    tokens: int
    found: bool


@torch.no_grad()
def ask(model: Any, haystack: Haystack, context: ContextMaker) -> list[Reply]:
    """Reads a haystack and asks for every needle in it.

    Args:
        model: An attached model.
        haystack: What to read.
        context: Makes the context of every pass: reading, and each question.

    Raises:
        ValueError: The model's output is not finite.
    """
    cache = new_cache(model, haystack.length)
    read_chunks(model, haystack.ids.to(model.device), cache, context)
    can_crop = all(isinstance(layer, IndexedLayer) for layer in cache.layers)
    replies = []
    for question, answer in zip(haystack.questions, haystack.answers, strict=True):
        own = cache if can_crop else copy.deepcopy(cache)
        ids = torch.tensor([[*question, *answer]], device=model.device)
        output = model(ids, past_key_values=own, use_cache=True, logits_to_keep=len(answer) + 1, dsa_context=context())
        if can_crop:
            cache.crop(-ids.shape[1])
        logits = output.logits[0, :-1].float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the model's output for a question is not finite; try fp32, and check the checkpoint")
        wanted = torch.tensor(answer)
        chosen = logits.double().log_softmax(dim=-1).gather(1, wanted[:, None])
        replies.append(Reply(float(chosen.sum()), len(answer), bool((logits.argmax(dim=-1) == wanted).all())))
    return replies


@dataclass(frozen=True)
class Cell:
    """One length and depth, over haystacks.

    Args:
        length: Tokens of the haystacks.
        depth: The tenth in which the needles lie, 0 to 9; `None` for all of them together.
        asked: Needles asked for.
        compared: Those that dense attention found: all that follows but `found` is over them.
        difference: Mean difference of the answer's log-probability to dense attention's, nats per answer; `None`
            where dense attention found none.
        half_width: Of its 95 % interval (Student's t over haystacks); `None` for fewer than two.
        difference_per_token: The same difference, per token of the answer.
        found: Share of all needles that the reader found.
        found_dense: Share of all needles that dense attention found.
    """

    length: int
    depth: int | None
    asked: int
    compared: int
    difference: float | None
    half_width: float | None
    difference_per_token: float | None
    found: float
    found_dense: float

    @property
    def is_lower(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.difference is not None and self.half_width is not None and self.difference + self.half_width < 0


Replies = Mapping[str, Sequence[Reply]]
"""Replies to one haystack's questions, by reader; `"dense"` among them."""


def cells(length: int, haystacks: Iterable[Replies], reader: str) -> list[Cell]:
    """One cell per depth, and one for all depths (a haystack's mean is then one observation).

    Args:
        length: Tokens of the haystacks.
        haystacks: What was replied, one item per haystack.
        reader: Who is compared with dense attention.
    """
    pairs = [list(zip(replies[reader], replies["dense"], strict=True)) for replies in haystacks]
    return [_cell(length, depth, [[each[depth]] for each in pairs]) for depth in range(DEPTHS)] + [
        _cell(length, None, pairs)
    ]


def _cell(length: int, depth: int | None, groups: list[list[tuple[Reply, Reply]]]) -> Cell:
    """A cell over haystacks, of which each brings some pairs `(reader, dense)`."""
    pairs = [pair for group in groups for pair in group]
    compared = [[pair for pair in group if pair[1].found] for group in groups]
    compared = [group for group in compared if group]
    difference, half_width, per_token = None, None, None
    if compared:
        difference, half_width = mean_interval([_mean(_difference(*pair) for pair in group) for group in compared])
        per_token = _mean(_mean(_difference(*pair) / pair[0].tokens for pair in group) for group in compared)
    return Cell(
        length=length,
        depth=depth,
        asked=len(pairs),
        compared=sum(map(len, compared)),
        difference=difference,
        half_width=half_width,
        difference_per_token=per_token,
        found=_mean(float(own.found) for own, _ in pairs),
        found_dense=_mean(float(dense.found) for _, dense in pairs),
    )


def _difference(own: Reply, dense: Reply) -> float:
    return own.log_probability - dense.log_probability


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
