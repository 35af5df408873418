"""`POST /v1/chat/completions` and `/v1/completions`: events as OpenAI's answers, whole or as a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any

from dsa.serve import stream
from dsa.serve.asking import Answering, usage
from dsa.serve.job import Done, Ended, Event, Piece, SentenceSources, TokenLogprob


class Form:
    """How an answer looks. `Chat` and `Completion` say what is in a choice."""

    kind = ""
    prefix = ""

    def __init__(self, model: str, logprobs: int | None, skipped: int = 0) -> None:
        """
        Args:
            model: As the client called it.
            logprobs: How many of the likeliest tokens are told; `None` for none.
            skipped: Characters of the document before its first that was read.
        """
        self.model, self.logprobs, self.skipped = model, logprobs, skipped
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The answer in one piece."""
        texts: dict[int, str] = {}
        told: dict[int, list[TokenLogprob]] = {}
        choices = []
        for each in events:
            if isinstance(each, Piece):
                texts[each.choice] = texts.get(each.choice, "") + each.text
                told.setdefault(each.choice, []).extend(each.logprobs)
            elif isinstance(each, Ended):
                choice = self.choice(each.choice, texts.get(each.choice, ""), told.get(each.choice, []))
                choices.append({**choice, "finish_reason": each.reason, **self.sources(each.sources)})
        done = events[-1]
        assert isinstance(done, Done)
        return {**self.head(self.kind), "choices": choices, "usage": usage(done)}

    async def parts(self, answering: Answering, *, with_usage: bool) -> AsyncIterator[str]:
        """The answer as a stream of events."""
        begun: set[int] = set()
        async for each in answering.events():
            if said := stream.comment(each):
                yield said
            elif isinstance(each, (Piece, Ended)):
                if each.choice not in begun:
                    begun.add(each.choice)
                    for opening in self.opening(each.choice):
                        yield self.part(opening, with_usage)
                if isinstance(each, Piece):
                    yield self.part({**self.delta(each), "finish_reason": None}, with_usage)
                else:
                    last = {**self.delta(Piece(each.choice, "")), "finish_reason": each.reason}
                    yield self.part({**last, **self.sources(each.sources)}, with_usage)
            elif isinstance(each, Done):
                if with_usage:
                    yield stream.event({**self.head(self.part_kind), "choices": [], "usage": usage(each)})
                yield stream.DONE

    def part(self, choice: dict[str, Any], with_usage: bool) -> str:
        """One event of a stream."""
        more = {"usage": None} if with_usage else {}
        return stream.event({**self.head(self.part_kind), "choices": [choice], **more})

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def sources(self, sentences: tuple[SentenceSources, ...]) -> dict[str, Any]:
        """What was read for each sentence, where it was asked for."""
        return {"dsa": {"sources": sources_of(sentences, self.skipped)}} if sentences else {}

    @property
    def part_kind(self) -> str:
        return self.kind

    def choice(self, index: int, text: str, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        """A choice of the whole answer, without its end."""
        raise NotImplementedError

    def delta(self, piece: Piece) -> dict[str, Any]:
        """A choice of a stream's event, without its end."""
        raise NotImplementedError

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices of the events that come before a choice's first piece."""
        return []


class Chat(Form):
    kind = "chat.completion"
    prefix = "chatcmpl"

    @property
    def part_kind(self) -> str:
        return "chat.completion.chunk"

    def choice(self, index: int, text: str, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(told)}

    def delta(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": piece.choice, "delta": delta, "logprobs": self._logprobs(piece.logprobs)}

    def opening(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def _logprobs(self, told: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.logprobs is None or not told:
            return None
        return {
            "content": [
                {
                    **_likelihood(each.text, each.logprob),
                    "top_logprobs": [_likelihood(text, logprob) for _, text, logprob in each.top],
                }
                for each in told
            ],
            "refusal": None,
        }


class Completion(Form):
    kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, logprobs: int | None, skipped: int = 0) -> None:
        super().__init__(model, logprobs, skipped)
        self._said: dict[int, int] = {}

    def choice(self, index: int, text: str, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(told, 0)}

    def delta(self, piece: Piece) -> dict[str, Any]:
        start = self._said.get(piece.choice, 0)
        self._said[piece.choice] = start + len(piece.text)
        return {"index": piece.choice, "text": piece.text, "logprobs": self._logprobs(piece.logprobs, start)}

    def _logprobs(self, told: Sequence[TokenLogprob], start: int) -> dict[str, Any] | None:
        if self.logprobs is None or not told:
            return None
        offsets = []
        for each in told:
            offsets.append(start)
            start += len(each.text)
        return {
            "tokens": [each.text for each in told],
            "token_logprobs": [each.logprob for each in told],
            "top_logprobs": [{text: logprob for _, text, logprob in each.top} for each in told],
            "text_offset": offsets,
        }


def sources_of(sentences: Sequence[SentenceSources], skipped: int) -> list[dict[str, Any]]:
    """What was read for each sentence, as JSON; characters of passages count from the document's first."""
    found = []
    for each in sentences:
        passages = [
            {**asdict(passage), "start": passage.start + skipped, "end": passage.end + skipped}
            for passage in each.passages
        ]
        pages = [asdict(page) for page in each.pages]
        found.append({"start": each.start, "end": each.end, "pages": pages, "passages": passages})
    return found


def _likelihood(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}
