"""What is planted in a haystack and how it is asked for: four kinds of needles, the families of RULER.

Every kind makes ten needles, one for each tenth of a text, from names and numbers made up by a seed:

| kind | what is planted for each needle | what makes it hard |
|---|---|---|
| `single` | one fact | ten facts about different things: it has only to be found |
| `multi-key` | one fact | all ten are about the same kind of thing, so nine mislead |
| `multi-value` | a first, a second and a third number of one thing | all three must be found, and told apart |
| `variable-tracking` | a name with a number, and two names that lead to it | link after link must be followed |

RULER is arXiv 2404.06654; words, names and numbers here are this file's own.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

DEPTHS = 10
_ORDINALS = ("first", "second", "third")
_CHAIN = 3

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
# Ten kinds of things that come in several, and whose they are.
_LISTS = (
    ("room number", "the {} delegation"),
    ("ticket number", "the {} choir"),
    ("parcel number", "the {} estate"),
    ("wagon number", "the {} railway"),
    ("account number", "the {} foundation"),
    ("stall number", "the {} market"),
    ("invoice number", "the {} brewery"),
    ("case number", "Judge {}"),
    ("track number", "the {} orchestra"),
    ("permit number", "the {} quarry"),
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_DIGITS = 5


@dataclass(frozen=True)
class Needle:
    """What is planted and how it is asked for.

    Args:
        sentences: What is planted, in the order of the text.
        prompts: What the model is given: the question after the haystack, up to the answer, then what stands between
            two parts of the answer.
        answers: What is to come after each prompt; it is judged, with everything before it given.
    """

    sentences: tuple[str, ...]
    prompts: tuple[str, ...]
    answers: tuple[str, ...]


def make_needles(generator: random.Random, kind: str = "single") -> list[Needle]:
    """Ten needles of one kind, the first for the first tenth of a text.

    Args:
        generator: Of names, numbers and order.
        kind: One of `KINDS`.

    Raises:
        ValueError: No such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return _MAKERS[kind](generator)


def _single(generator: random.Random) -> list[Needle]:
    return [_fact(what, where.format(_name(generator)), generator) for what, where in generator.sample(_FACTS, DEPTHS)]


def _multi_key(generator: random.Random) -> list[Needle]:
    what, where = generator.choice(_FACTS)
    names = _different(generator)
    return [_fact(what, where.format(next(names)), generator) for _ in range(DEPTHS)]


def _multi_value(generator: random.Random) -> list[Needle]:
    needles = []
    for what, where in generator.sample(_LISTS, DEPTHS):
        whose = where.format(_name(generator))
        values = [_number(generator) for _ in _ORDINALS]
        sentences = tuple(
            f"\n\nThe {ordinal} {what} of {whose} is {value}.\n\n"
            for ordinal, value in zip(_ORDINALS, values, strict=True)
        )
        question = (
            f"\n\nQuestion: What are the three {what}s of {whose}?\nAnswer: The {_ORDINALS[0]} {what} of {whose} is"
        )
        between = (f", the {ordinal} {what} of {whose} is" for ordinal in _ORDINALS[1:])
        needles.append(Needle(sentences, (question, *between), tuple(f" {value}" for value in values)))
    return needles


def _variable_tracking(generator: random.Random) -> list[Needle]:
    needles = []
    words = _different(generator)
    for _ in range(DEPTHS):
        chain = [_number(generator), *(next(words) for _ in range(_CHAIN))]
        sentences = tuple(f"\n\nLet {name} = {source}.\n\n" for source, name in itertools.pairwise(chain))
        question = f"\n\nQuestion: What is the value of {chain[-1]}?\nAnswer: {chain[-1]} ="
        between = (" =" for _ in chain[2:])
        needles.append(Needle(sentences, (question, *between), tuple(f" {source}" for source in chain[-2::-1])))
    return needles


_MAKERS: dict[str, Callable[[random.Random], list[Needle]]] = {
    "single": _single,
    "multi-key": _multi_key,
    "multi-value": _multi_value,
    "variable-tracking": _variable_tracking,
}
KINDS = tuple(_MAKERS)


def _fact(what: str, where: str, generator: random.Random) -> Needle:
    fact, number = f"{what} of {where} is", _number(generator)
    question = f"\n\nQuestion: What is the {fact.removesuffix(' is')}?\nAnswer: The {fact}"
    return Needle((f"\n\nThe {fact} {number}.\n\n",), (question,), (f" {number}",))


def _name(generator: random.Random) -> str:
    return "".join(generator.choice(_CONSONANTS) + generator.choice(_VOWELS) for _ in range(3)).capitalize()


def _different(generator: random.Random) -> Iterator[str]:
    """Names, none of them twice."""
    seen: set[str] = set()
    while True:
        name = _name(generator)
        if name not in seen:
            seen.add(name)
            yield name


def _number(generator: random.Random) -> str:
    return str(generator.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))
