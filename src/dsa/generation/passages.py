"""A text cut into passages: a sentence or a few, never across pages."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

LEAST, MOST = 12, 64
"""Tokens a passage has at least, where its page or part does not end, and at most."""

WORDS = 3
"""Words that a passage has at least, to be shown as one."""
RUNNING_PAGES = 3
"""What stands on so many pages in the same words, numbers aside, is a running header or footer."""

WORD = re.compile(r"[^\W\d_]{2,}|[\u3040-\u30ff\u3400-\u9fff]")
SENTENCE_END = re.compile(r"[.!?:;\u3002\uff01\uff1f][\"')\]]*\s*$|\n\s*$")


@dataclass(frozen=True)
class Passage:
    """Some tokens that belong together.

    Args:
        start: Position of the first token.
        end: One past the last.
        page: The document's page, `None` where it has none and outside the document.
        part: `"document"`, `"before"` and `"question"` of the prompt around it, or `"answer"`.
    """

    start: int
    end: int
    page: int | None
    part: str


def cut(tokens: Sequence[str], pages: Sequence[int | None], parts: Sequence[str]) -> list[Passage]:
    """Passages of a sentence or a few, never across pages or parts.

    Args:
        tokens: Text of every token.
        pages: Page of every token.
        parts: Part of every token, see `Passage`.
    """
    passages, start = [], 0
    for place in range(len(tokens)):
        last = place + 1 == len(tokens)
        length = place + 1 - start
        if (
            last
            or length >= MOST
            or pages[place] != pages[place + 1]
            or parts[place] != parts[place + 1]
            or (length >= LEAST and SENTENCE_END.search(tokens[place]))
        ):
            passages.append(Passage(start, place + 1, pages[start], parts[start]))
            start = place + 1
    return passages


def tells(passages: Sequence[Passage], texts: Sequence[str]) -> list[bool]:
    """Which passages say something: white space, `. 43` and the running headers of pages do not.

    Args:
        passages: What `cut` returned.
        texts: The text of each.
    """
    pages: dict[str, set[int | None]] = defaultdict(set)
    bare = [" ".join(re.sub(r"\d+", "", text).split()) for text in texts]
    for passage, text in zip(passages, bare, strict=True):
        pages[text].add(passage.page)
    return [len(WORD.findall(text)) >= WORDS and len(pages[text]) < RUNNING_PAGES for text in bare]
