"""Between HTTP and the engine: a request is put in line, and its events come back into the event loop.

A client that hangs up cancels its work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest

from dsa.serve.engine import Engine, Full, TooLong
from dsa.serve.errors import Refused
from dsa.serve.job import Done, Ended, Event, Failed, Piece, Request
from dsa.serve.metrics import Metrics
from dsa.serve.prompts import Prompts

QUIET_S = 10.0
"""Seconds after which a stream says that it is still there."""

STATUS = {"memory": 503, "time": 504, "output": 500, "format": 400, "stopped": 503, "internal": 500}


class Asking:
    """See the module."""

    def __init__(self, engine: Engine, prompts: Prompts, metrics: Metrics) -> None:
        self.engine, self.prompts, self.metrics = engine, prompts, metrics

    def submit(self, request: Request, http: HttpRequest) -> Answering:
        """Puts it in line. Raises `Refused` where it is too long, or too many wait."""
        answering = Answering(self, request, http)
        try:
            answering.job = self.engine.submit(request, answering.listen)
        except TooLong as error:
            raise Refused(str(error), "messages", code="context_length_exceeded") from error
        except Full as error:
            raise Refused(
                f"too many requests wait; try again in {error.retry_s} s",
                status=429,
                code="rate_limit_exceeded",
                headers={"retry-after": str(error.retry_s)},
            ) from error
        return answering


class Answering:
    """One request's events."""

    def __init__(self, asking: Asking, request: Request, http: HttpRequest) -> None:
        self.request = request
        self.job: Any = None
        self._asking, self._http = asking, http
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._said: dict[int, str] = {}

    def listen(self, event: Event) -> None:
        """Called by the engine, in its thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Event | None]:
        """Every event, `None` after a while without one. Leaving it early cancels the work.

        Raises:
            Refused: The work failed.
        """
        try:
            while True:
                try:
                    # `wait_for` loses a cancellation that comes together with an event.
                    async with asyncio.timeout(QUIET_S):
                        event = await self._events.get()
                except TimeoutError:
                    yield None
                    continue
                if isinstance(event, Failed):
                    raise Refused(event.message, status=STATUS[event.kind], code=event.kind)
                self._note(event)
                yield event
                if isinstance(event, Done):
                    return
        finally:
            self.job.cancel()

    async def collected(self) -> list[Event]:
        """All events, for an answer in one piece.

        Raises:
            Refused: The work failed, or the client has gone.
        """

        async def gather() -> list[Event]:
            return [event async for event in self.events() if event is not None]

        async def gone() -> None:
            while (await self._http.receive())["type"] != "http.disconnect":
                pass

        work, leaving = asyncio.ensure_future(gather()), asyncio.ensure_future(gone())
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise Refused("the client has gone", status=499)
        finally:
            self.job.cancel()
            for task in (work, leaving):
                task.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)

    def _note(self, event: Event) -> None:
        if isinstance(event, Piece):
            self._said[event.choice] = self._said.get(event.choice, "") + event.text
        elif isinstance(event, Ended):
            self._asking.prompts.remember(self.request.owner, self._said.get(event.choice, ""), event.token_ids)
        elif isinstance(event, Done):
            self._asking.metrics.answered(event)
            counted = {"read": event.read - event.held, "held": event.held, "written": event.written}
            self._http.state.tokens = counted


def usage(done: Done) -> dict[str, Any]:
    """OpenAI's `usage` of chat and of completions."""
    return {
        "prompt_tokens": done.read,
        "completion_tokens": done.written,
        "total_tokens": done.read + done.written,
        "prompt_tokens_details": {"cached_tokens": done.held},
    }
