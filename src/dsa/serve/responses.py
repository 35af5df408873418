"""`POST /v1/responses`: events as OpenAI's responses, whole or as a stream."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from dsa.serve import stream
from dsa.serve.asking import Answering
from dsa.serve.chat import sources_of
from dsa.serve.job import Done, Ended, Event, Piece
from dsa.serve.schemas import ResponseRequest


class Response:
    """One response while it is made."""

    def __init__(self, given: ResponseRequest, skipped: int = 0) -> None:
        """
        Args:
            given: What was asked.
            skipped: Characters of the document before its first that was read.
        """
        self.given, self.skipped = given, skipped
        self.id, self.item = f"resp_{secrets.token_hex(12)}", f"msg_{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.text = ""
        self.ended: Ended | None = None

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The response in one piece."""
        for each in events:
            self._note(each)
        done = events[-1]
        assert isinstance(done, Done)
        return self._plain(done)

    async def parts(self, answering: Answering) -> AsyncIterator[str]:
        """The response as a stream of events."""
        numbers = itertools.count()

        def say(kind: str, **fields: Any) -> str:
            return stream.event({"type": kind, "sequence_number": next(numbers), **fields}, kind)

        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        yield say("response.created", response=self._plain(None))
        yield say("response.in_progress", response=self._plain(None))
        yield say("response.output_item.added", output_index=0, item=self._message(is_begun=True))
        yield say("response.content_part.added", **place, part=_part(""))
        async for each in answering.events():
            if said := stream.comment(each):
                yield said
            elif isinstance(each, Piece) and each.text:
                yield say("response.output_text.delta", **place, delta=each.text, logprobs=[])
            self._note(each)
            if isinstance(each, Done):
                yield say("response.output_text.done", **place, text=self.text, logprobs=[])
                yield say("response.content_part.done", **place, part=_part(self.text))
                yield say("response.output_item.done", output_index=0, item=self._message())
                plain = self._plain(each)
                yield say(f"response.{plain['status']}", response=plain)

    def _note(self, event: Event | None) -> None:
        if isinstance(event, Piece):
            self.text += event.text
        elif isinstance(event, Ended):
            self.ended = event

    def _message(self, *, is_begun: bool = False) -> dict[str, Any]:
        status = "in_progress" if is_begun else self._status()
        content = [] if is_begun else [_part(self.text)]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _status(self) -> str:
        if self.ended is None:
            return "in_progress"
        return "completed" if self.ended.reason == "stop" else "incomplete"

    def _format(self) -> dict[str, Any]:
        form = None if self.given.text is None else self.given.text.format
        return {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)

    def _plain(self, done: Done | None) -> dict[str, Any]:
        given, status = self.given, self._status()
        plain: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": given.model,
            "output": [] if done is None else [self._message()],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": given.instructions,
            "metadata": given.metadata or {},
            "max_output_tokens": given.max_output_tokens,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if given.temperature is None else given.temperature,
            "top_p": 1.0 if given.top_p is None else given.top_p,
            "text": {"format": self._format()},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "usage": None if done is None else _usage(done),
        }
        if self.ended is not None and self.ended.sources:
            plain["dsa"] = {"sources": sources_of(self.ended.sources, self.skipped)}
        return plain


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(done: Done) -> dict[str, Any]:
    return {
        "input_tokens": done.read,
        "input_tokens_details": {"cached_tokens": done.held},
        "output_tokens": done.written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": done.read + done.written,
    }
