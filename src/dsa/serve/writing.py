"""One answer while it is written: tokens become text, stop texts end it, sentences get their sources."""

from __future__ import annotations

from typing import Any

from dsa.generation.passages import SENTENCE_END
from dsa.generation.sampling import Sampling
from dsa.generation.sources import Watch, sources_of
from dsa.generation.text import TextPieces
from dsa.serve.grammar import Grammar
from dsa.serve.job import Piece, Request, SentenceSources, TokenLogprob
from dsa.serve.processors import CountPenalty, Likelihoods


class Writer:
    """See the module.

    Attributes:
        token_ids: Written so far.
        text: What was told of the answer so far.
        is_stopped: Whether a stop text was found, or the answer is complete in its format.
    """

    def __init__(
        self, request: Request, choice: int, tokenizer: Any, watch: Watch | None = None, grammar: Grammar | None = None
    ) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.is_stopped = False
        self._request, self._choice, self._tokenizer = request, choice, tokenizer
        self._grammar = grammar
        self._pieces = TextPieces(tokenizer)
        self._held = ""
        self._likelihoods = None if request.logprobs is None else Likelihoods()
        self._told: list[TokenLogprob] = []
        self._sentences = None if watch is None else Sentences(watch, request)

    def sampling(self) -> Sampling:
        """How this answer's tokens are chosen."""
        request = self._request
        processors: list[Any] = [] if self._likelihoods is None else [self._likelihoods]
        if request.presence_penalty or request.frequency_penalty:
            prompt = len(request.prompt.ids)
            processors.append(CountPenalty(prompt, request.presence_penalty, request.frequency_penalty))
        if self._grammar is not None:
            processors.append(self._grammar)
        seed = None if request.seed is None else request.seed + self._choice
        return Sampling(request.temperature, request.top_p, seed, processors)

    def add(self, token: int) -> Piece | None:
        """One token more; what is to be told now."""
        self.token_ids.append(token)
        if self._likelihoods is not None:
            self._told.append(self._likelihood(token, self._likelihoods))
        piece = self._tell(self._pieces.add(token), is_last=False)
        self.is_stopped = self.is_stopped or (self._grammar is not None and self._grammar.take(token))
        return piece

    def end(self) -> Piece | None:
        """What is left to tell after the last token."""
        return self._tell("" if self.is_stopped else self._pieces.rest(), is_last=True)

    def sources(self) -> tuple[SentenceSources, ...]:
        """Of each sentence, after the end."""
        return () if self._sentences is None else self._sentences.ended(len(self.text))

    def _tell(self, text: str, *, is_last: bool) -> Piece | None:
        waiting = self._held + text
        found = [place for place in (waiting.find(stop) for stop in self._request.stop) if place >= 0]
        if found:
            self.is_stopped = True
            waiting, self._held = waiting[: min(found)], ""
        elif is_last:
            self._held = ""
        else:
            # What may be the beginning of a stop text waits for more.
            keep = max((_begun(waiting, stop) for stop in self._request.stop), default=0)
            waiting, self._held = waiting[: len(waiting) - keep], waiting[len(waiting) - keep :]
        if self._sentences is not None and waiting:
            self._sentences.add(self.text, waiting)
        self.text += waiting
        logprobs, self._told = tuple(self._told), []
        return Piece(self._choice, waiting, logprobs) if waiting or logprobs else None

    def _likelihood(self, token: int, seen: Likelihoods) -> TokenLogprob:
        logprobs = seen.logprobs
        values, places = logprobs.topk(min(self._request.logprobs or 0, logprobs.numel()))
        top = [
            (place, self._alone(place), value) for place, value in zip(places.tolist(), values.tolist(), strict=True)
        ]
        return TokenLogprob(token, self._alone(token), float(logprobs[token]), tuple(top))

    def _alone(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


class Sentences:
    """Shares out what was watched among the sentences of an answer."""

    def __init__(self, watch: Watch, request: Request) -> None:
        self._watch, self._request = watch, request
        self._before = watch.weights.clone()
        self._start = 0
        self._found: list[SentenceSources] = []

    def add(self, said: str, piece: str) -> None:
        """A piece that follows what was said; where it begins with white space, a sentence may have ended."""
        sentence = said[self._start :]
        if piece[0].isspace() and sentence.strip() and SENTENCE_END.search(sentence):
            self._close(len(said))

    def ended(self, length: int) -> tuple[SentenceSources, ...]:
        """All of them."""
        if length > self._start:
            self._close(length)
        return tuple(self._found)

    def _close(self, end: int) -> None:
        weights = self._watch.weights
        sources = sources_of(weights - self._before, self._request.prompt, pages=3, passages=5)
        self._found.append(SentenceSources(self._start, end, sources.pages, sources.passages))
        self._before, self._start = weights.clone(), end


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
