"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse

from dsa.serve.errors import Refused, body
from dsa.serve.job import Event, Reading

DONE = "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Ends its work when it has ended or its client has gone, whatever the server is."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], ended: Callable[[], None]) -> None:
        """
        Args:
            content: Events as text.
            ended: Called in any case.
        """
        super().__init__(content, headers={"x-accel-buffering": "no"})
        self._ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            # By this version the response listens for a client that goes.
            await super().__call__({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, send)
        finally:
            self._ended()


def event(plain: dict[str, Any], kind: str | None = None) -> str:
    """An event with JSON, of a kind where there are several."""
    return ("" if kind is None else f"event: {kind}\n") + f"data: {json.dumps(plain, ensure_ascii=False)}\n\n"


def comment(seen: Event | None) -> str | None:
    """A comment that says how far reading is, or that the server is there; `None` for other events."""
    if seen is None:
        return ": still there\n\n"
    return f": read {seen.held} of {seen.total}\n\n" if isinstance(seen, Reading) else None


async def with_errors(content: AsyncIterator[str], kind: str | None = None) -> AsyncIterator[str]:
    """A stream whose error, where the work fails, is its last event."""
    try:
        async for each in content:
            yield each
    except Refused as error:
        yield event(body(error), kind)
