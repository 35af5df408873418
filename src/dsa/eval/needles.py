"""Needles in a haystack: facts planted in a long text, one per tenth of it, and asked for one by one.

A haystack is the user's own text with ten needles of one kind (`dsa.eval.needle_kinds`) in it, such as "The locker
number of Captain Doraki is 80213.". The model reads it once; then each question is put after it, with its answer, and
the answer's log-probability is read off. So one reading serves ten questions, each as if it had been the only one: the
cache is cropped in between.

What counts is the difference to dense attention where dense attention itself finds the answer, that is, where every
token of it is its first choice (its greedy continuation is then the answer).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsa.eval.comparison import ContextMaker, new_cache, read_chunks
from dsa.eval.needle_kinds import DEPTHS, Needle, make_needles
from dsa.models.rope import angles_for
from dsa.modules.cache import IndexedLayer

_SENTENCE_ENDS = (".", "!", "?", "\n")
_LOOK_AHEAD = 128


@dataclass(frozen=True)
class Haystack:
    """A text with needles in it.

    Args:
        ids: int64 `[1, n]`.
        length: `n` and room for the longest question with its answer.
        needles: In the order of the text; the first sentence of needle `d` lies in tenth `d` of it, the others
            anywhere after that.
        places: Where the sentences of each begin.
        prompts: Their prompts' tokens, part by part.
        answers: Their answers' tokens, part by part.
    """

    ids: torch.Tensor
    length: int
    needles: tuple[Needle, ...]
    places: tuple[tuple[int, ...], ...]
    prompts: tuple[list[list[int]], ...]
    answers: tuple[list[list[int]], ...]


def make_haystack(tokens: Sequence[int], tokenizer: Any, length: int, seed: int, kind: str = "single") -> Haystack:
    """Plants ten needles, each from a random place of its tenth on, after the end of a sentence where one is near.

    Args:
        tokens: The text, without special tokens. What is taken begins at a random place.
        tokenizer: Its tokenizer.
        length: Tokens in all, question and answer included.
        seed: Of needles and places.
        kind: One of `dsa.eval.needle_kinds.KINDS`.

    Raises:
        ValueError: No such kind, the length has no room for the needles, or the text is shorter than that.
    """
    generator = random.Random(seed)
    needles = make_needles(generator, kind)

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    sentences = [[encoded(each) for each in needle.sentences] for needle in needles]
    prompts = [[encoded(part) for part in needle.prompts] for needle in needles]
    answers = [[encoded(part) for part in needle.answers] for needle in needles]
    head = list(tokenizer("")["input_ids"])
    asked = max(sum(map(len, [*prompt, *answer])) for prompt, answer in zip(prompts, answers, strict=True))
    planted = sum(len(each) for of_needle in sentences for each in of_needle)
    room = length - len(head) - asked - planted
    if room < DEPTHS:
        raise ValueError(
            f"length must leave room for {DEPTHS} needles ({kind}) and a question, {length - room + DEPTHS:,} tokens "
            f"here, got {length}; ask for more"
        )
    if len(tokens) < room:
        raise ValueError(f"a haystack of {length:,} tokens needs a text of {room:,}, this one has {len(tokens):,}")
    begin = generator.randrange(len(tokens) - room + 1)
    hay = tokens[begin : begin + room]
    ids, places, done = head, [[0] * len(each) for each in sentences], 0
    for wanted, stop, depth, part in _spots(generator, room, [len(each) for each in sentences]):
        cut = max(done, _behind_sentence(hay, wanted, stop, tokenizer))
        ids = [*ids, *hay[done:cut]]
        places[depth][part] = len(ids)
        ids, done = [*ids, *sentences[depth][part]], cut
    ids = [*ids, *hay[done:]]
    where = tuple(tuple(each) for each in places)
    return Haystack(torch.tensor([ids]), length, tuple(needles), where, tuple(prompts), tuple(answers))


def _spots(generator: random.Random, room: int, counts: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Where in a text of `room` tokens every sentence is to go: `(wanted, stop, depth, part)`, in order."""
    first = [int((depth + generator.random()) * room / DEPTHS) for depth in range(DEPTHS)]
    spots = []
    for depth, count in enumerate(counts):
        spots.append((first[depth], (depth + 1) * room // DEPTHS, depth, 0))
        later = sorted(generator.randint(first[depth], room) for _ in range(count - 1))
        spots += [(wanted, room, depth, part) for part, wanted in enumerate(later, start=1)]
    return sorted(spots, key=lambda spot: (spot[0], *spot[2:]))


def _behind_sentence(hay: Sequence[int], wanted: int, stop: int, tokenizer: Any) -> int:
    """The first place from `wanted` on, before `stop`, where a sentence ends; `wanted` where none does."""
    for place in range(wanted + 1, min(stop, wanted + _LOOK_AHEAD)):
        if tokenizer.decode([hay[place - 1]]).endswith(_SENTENCE_ENDS):
            return place
    return wanted


@dataclass(frozen=True)
class Reply:
    """What a model made of one answer, or of one part of an answer with those before it given.

    Args:
        depth: The needle's tenth of the text, 0 to 9.
        log_probability: Of the whole of it, in nats.
        tokens: Its length.
        found: Whether every token of it is the model's first choice.
    """

    depth: int
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

    Returns:
        One reply for each part of every answer, needle by needle.

    Raises:
        ValueError: The model's output is not finite.
    """
    cache = new_cache(model, haystack.length)
    read_chunks(model, haystack.ids.to(model.device), cache, context, length=haystack.length)
    can_crop = all(isinstance(layer, IndexedLayer) for layer in cache.layers)
    replies: list[Reply] = []
    for depth, parts in enumerate(zip(haystack.prompts, haystack.answers, strict=True)):
        own = cache if can_crop else copy.deepcopy(cache)
        spans, asked = _spans(*parts)
        first = spans[0].start - 1
        ids = torch.tensor([asked], device=model.device)
        with angles_for(model, haystack.length):
            output = model(
                ids, past_key_values=own, use_cache=True, logits_to_keep=len(asked) - first, dsa_context=context()
            )
        if can_crop:
            cache.crop(-len(asked))
        logits = output.logits[0].float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the model's output for a question is not finite; try fp32, and check the checkpoint")
        for span in spans:
            wanted = torch.tensor(asked[span])
            row = logits[span.start - 1 - first : span.stop - 1 - first]
            chosen = row.double().log_softmax(dim=-1).gather(1, wanted[:, None])
            is_first = bool((row.argmax(dim=-1) == wanted).all())
            replies.append(Reply(depth, float(chosen.sum()), len(wanted), is_first))
    return replies


def _spans(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> tuple[list[slice], list[int]]:
    """Prompts and answers in turn as one list, and where in it the answers are."""
    spans: list[slice] = []
    joined: list[int] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        begin = len(joined) + len(prompt)
        spans.append(slice(begin, begin + len(answer)))
        joined += [*prompt, *answer]
    return spans, joined
