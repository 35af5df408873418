"""Where in a document an answer was read: pages and passages, by the attention of the tokens that were written.

Only decoding is watched, and only some of the layers that select, so that it costs a few per cent of a token. Kept is
one number for each token of the prompt.

Shapes: `H`/`G` query / KV heads, `D` head dim, `n` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dsa.config import DSAConfig
from dsa.documents import SourceDocument
from dsa.documents.prompt import Prompt
from dsa.generation.passages import cut, tells
from dsa.models.context import AttentionCall, DSAContext

WATCHED_EVERY = 3
"""Of every so many layers one is watched."""


@dataclass(frozen=True)
class PageShare:
    """A page and its share of what was read of the document beyond sinks and the most recent tokens."""

    page: int
    share: float


@dataclass(frozen=True)
class SourcePassage:
    """A passage that was read, as it stands in the document.

    Args:
        text: With single spaces in place of white space.
        page: `None` where there are no pages.
        share: Of what was read of the document beyond sinks and the most recent tokens.
        start: Its first character in the document; white space that the document begins with does not count.
        end: The character after its last.
    """

    text: str
    page: int | None
    share: float
    start: int
    end: int


@dataclass(frozen=True)
class Sources:
    """What an answer was read from, most read first. Empty where nothing had to be selected."""

    pages: tuple[PageShare, ...] = ()
    passages: tuple[SourcePassage, ...] = ()


class Watch:
    """Adds up what the written tokens read. Its `context` goes to `Session.using`.

    Args:
        config: What the model is attached or accelerated with.
        tokens: Tokens of the prompt.
    """

    def __init__(self, config: DSAConfig, tokens: int) -> None:
        self._config, self._tokens = config, tokens
        self.weights = torch.zeros(tokens)
        self._ranks: dict[int, int] = {}

    def context(self) -> DSAContext:
        """Of one forward pass."""
        return DSAContext(observer=self._see)

    @torch.no_grad()
    def _see(self, call: AttentionCall) -> None:
        if call.query.shape[1] != 1 or call.indices is None:
            return
        if self._ranks.setdefault(call.layer, len(self._ranks)) % WATCHED_EVERY:
            return
        selections = call.indices.shape[2] if call.indices.ndim == 4 else 1
        for part in call.by_selection(selections):
            self._add(part, 1 / selections)

    def _add(self, call: AttentionCall, share: float) -> None:
        """Adds what the heads of one selection read."""
        assert call.indices is not None
        chosen = call.indices[0, 0].long()
        chosen = chosen[chosen >= 0]
        groups = call.key.shape[2]
        query = (call.query[0, 0].float() * call.scale).unflatten(0, (groups, -1))
        scores = torch.einsum("ghd,kgd->ghk", query, call.key[0, chosen].float())
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        weights = scores.softmax(dim=-1).mean(dim=(0, 1)).cpu()
        places = chosen.cpu()
        recent = int(call.key_end[0, 0]) - self._config.layer_local(call.layer)
        far = (places >= self._config.sinks) & (places < min(recent, self._tokens))
        self.weights.index_add_(0, places[far], share * weights[far])

    def sources(self, prompt: Prompt, *, pages: int = 3, passages: int = 5) -> Sources:
        """What was read of the document, at most so many pages and passages.

        White space, bare numbers and running headers take attention that is about nothing in them, and do not count.
        """
        return sources_of(self.weights, prompt, pages=pages, passages=passages)


def sources_of(weights: Tensor, prompt: Prompt, *, pages: int, passages: int) -> Sources:
    """The most read pages and passages of a document.

    Args:
        weights: fp32 `[n]`, attention on each token of the prompt.
        prompt: Of the same tokens.
        pages: At most so many; a page with less than half the share of an even reading is none.
        passages: At most so many.
    """
    if not prompt.texts or not bool(weights.any()):
        return Sources()
    found = [each for each in cut(prompt.texts, prompt.pages, prompt.parts) if each.part == "document"]
    texts = ["".join(prompt.texts[each.start : each.end]) for each in found]
    told = [
        (float(weights[each.start : each.end].sum()), each, text)
        for each, text, says in zip(found, texts, tells(found, texts), strict=True)
        if says
    ]
    total = sum(share for share, _, _ in told)
    if not total:
        return Sources()
    by_page: dict[int, float] = {}
    for share, each, _ in told:
        if each.page is not None:
            by_page[each.page] = by_page.get(each.page, 0.0) + share / total
    least = 0.5 / max(1, len(by_page))
    best = sorted((page for page, share in by_page.items() if share >= least), key=lambda page: -by_page[page])
    told.sort(key=lambda each: -each[0])
    starts = _characters(prompt)
    return Sources(
        tuple(PageShare(page, by_page[page]) for page in best[:pages]),
        tuple(
            SourcePassage(" ".join(text.split()), each.page, share / total, starts[each.start], starts[each.end])
            for share, each, text in told[:passages]
        ),
    )


def _characters(prompt: Prompt) -> list[int]:
    """How many characters of the document stand before each token, and before the end."""
    lengths = (len(text) * (part == "document") for text, part in zip(prompt.texts, prompt.parts, strict=True))
    return list(accumulate(lengths, initial=0))


def pages_in_words(shares: Sequence[PageShare], document: SourceDocument) -> str:
    """`p. 7, 12, 3`, most read first; of several files `a.pdf, p. 7; b.txt`."""
    if document.is_joined:
        return "; ".join(document.place(each.page) for each in shares)
    return f"p. {', '.join(str(each.page) for each in shares)}"
