"""The inference thread: several requests at once on one model.

Requests wait in line, clients take turns. A round is one token of every answer that is being written and one chunk of
one prompt that is being read, so nobody's answer waits for another's document longer than a chunk takes. Between two
steps a request can be cancelled.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from dsa.config import DSAConfig
from dsa.generation.room import check_room
from dsa.generation.session import Session, common_prefix
from dsa.generation.sources import Watch
from dsa.models.extension import Demand, positions_of
from dsa.models.loading import LoadedModel
from dsa.models.sparse import is_sparse, sparse_report_of
from dsa.serve.grammar import Grammars, OutOfFormat
from dsa.serve.job import Done, Ended, Event, Failed, Job, Reading, Request
from dsa.serve.logs import log_mistake
from dsa.serve.sessions import Sessions
from dsa.serve.writing import Writer
from dsa.store import ModelStore
from dsa.store.kept import LEAST_TOKENS

logger = logging.getLogger("dsa.serve")

CHUNK = 512
"""Prompt tokens read between two tokens of an answer, which waits for them."""

MOST_CLIENTS = 10_000
"""Remembered for whose turn it is."""


class Full(Exception):
    """The line is full.

    Args:
        retry_s: Seconds after which it is worth trying again.
    """

    def __init__(self, retry_s: int) -> None:
        super().__init__(f"{retry_s} s")
        self.retry_s = retry_s


class TooLong(ValueError):
    """A prompt and its answer take more positions than there are."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes on.

    Args:
        sessions: Requests worked on at once, and caches kept in memory.
        queue: Requests that wait.
        time_s: Seconds that a request may take, waiting included.
    """

    sessions: int = 8
    queue: int = 64
    time_s: float = 1800.0


@dataclass
class _Running:
    job: Job
    session: Session
    steps: Iterator[None]


class Engine:
    """See the module. The thread runs from the beginning until `close`."""

    def __init__(
        self, loaded: LoadedModel, *, store: ModelStore | None = None, limits: Limits | None = None, chunk: int = CHUNK
    ) -> None:
        """
        Args:
            loaded: The model, attached, accelerated or plain. Nobody else may use it while the engine runs.
            store: Where documents are opened from and kept in.
            limits: What is taken on.
            chunk: Prompt tokens read in one step.
        """
        self.loaded, self.limits, self.store, self.chunk = loaded, limits or Limits(), store, chunk
        self.config: DSAConfig | None = sparse_report_of(loaded.model).config if is_sparse(loaded.model) else None
        self.positions = positions_of(loaded.model.config)
        self.grammars = Grammars(loaded)
        self._stores: dict[str, ModelStore] = {}
        self._sessions = Sessions(self._new_session, self.limits.sessions)
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: list[_Running] = []
        self._served: dict[str, int] = {}
        self._forgotten: list[tuple[str, str]] = []
        self._took_s = 10.0
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="dsa-inference", daemon=True)
        self._thread.start()

    def submit(self, request: Request, listener: Callable[[Event], None]) -> Job:
        """Puts a request in line, and returns at once.

        Args:
            request: What is asked.
            listener: Called with every event, in the inference thread; it must return quickly.

        Raises:
            TooLong: It takes more positions than there are.
            Full: The line is full, or the engine is closed.
        """
        self.check_length(len(request.prompt.ids), request.max_new_tokens)
        job = Job(request, listener, time.monotonic() + self.limits.time_s)
        with self._changed:
            if self._is_closing or len(self._waiting) >= self.limits.queue:
                turns = math.ceil(max(1, len(self._waiting)) / self.limits.sessions)
                raise Full(max(1, min(600, math.ceil(self._took_s * turns))))
            self._waiting.append(job)
            self._changed.notify()
        return job

    def check_length(self, prompt: int, new: int) -> None:
        """Raises `TooLong` where a prompt of so many tokens and its answer have no room."""
        if self.positions is not None and prompt + new > self.positions:
            raise TooLong(
                f"this model reads and writes {self.positions:,} tokens together, and the prompt has {prompt:,} and "
                f"the answer up to {new:,}; send a shorter prompt or ask for a shorter answer"
            )

    def forget(self, owner: str, document: str) -> None:
        """Has everything that was read of a document go: from memory, and from the store. Returns before it is gone."""
        with self._changed:
            self._forgotten.append((owner, document))
            self._changed.notify()

    def figures(self) -> dict[str, int]:
        """How many requests wait and are worked on, and what is held."""
        sessions = self._sessions
        return {
            "waiting": len(self._waiting),
            "running": len(self._running),
            "sessions": len(sessions),
            "tokens": sessions.held(),
        }

    def close(self) -> None:
        """Ends what waits and what runs, and then the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _new_session(self, owner: str) -> Session:
        return Session(self.loaded.model, chunk=self.chunk, store=self._store_of(owner))

    def _store_of(self, owner: str) -> ModelStore | None:
        if self.store is None:
            return None
        return self._stores.setdefault(owner, self.store.owned_by(owner))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._is_closing or self._waiting or self._running or self._forgotten):
                    self._changed.wait()
                if self._is_closing:
                    break
            self._round()
        for running in list(self._running):
            self._end(running, Failed("stopped", "the server has been stopped"))
        for job in self._waiting:
            job.tell(Failed("stopped", "the server has been stopped"))
        self._waiting.clear()

    def _round(self) -> None:
        self._forget()
        self._admit()
        writing = [each for each in self._running if not each.job.is_reading]
        # Whoever has just read stands last.
        reading = [each for each in self._running if each.job.is_reading][:1]
        for running in [*writing, *reading]:
            self._step(running)
            if running.job.is_reading and running in self._running:
                self._running.remove(running)
                self._running.append(running)

    def _step(self, running: _Running) -> None:
        try:
            next(running.steps)
        except StopIteration:
            self._end(running, self._outcome(running.job))
        except Exception as error:
            failed = _failure(error)
            running.session.empty()
            self._end(running, failed)

    def _outcome(self, job: Job) -> Event:
        if job.must_stop():
            return Failed("time", f"the answer took longer than {self.limits.time_s:,.0f} s")
        return Done(len(job.request.prompt.ids), job.held, job.written, job.first_token_s)

    def _end(self, running: _Running, event: Event) -> None:
        self._running.remove(running)
        running.steps.close()  # type: ignore[attr-defined]
        try:
            if running.job.request.keep >= LEAST_TOKENS:
                running.session.keep_answer()
            else:
                running.session.close()
        except Exception as error:
            # What cannot be kept is read again.
            logger.warning("what was read could not be kept: %s", type(error).__name__)
        self._sessions.give_back(running.job.request.owner, running.session)
        self._took_s = 0.7 * self._took_s + 0.3 * (time.monotonic() - running.job.began)
        running.job.tell(event)

    def _forget(self) -> None:
        """Documents that are being asked about go when the answers have ended."""
        with self._changed:
            forgotten, self._forgotten = self._forgotten, []
            asked = [*self._waiting, *(each.job for each in self._running)]
        for owner, document in forgotten:
            if any(job.request.owner == owner and job.request.document == document for job in asked):
                self._forgotten.append((owner, document))
                continue
            self._sessions.forget(owner, document)
            store = self._store_of(owner)
            if store is not None:
                try:
                    store.forget(document)
                except OSError as error:
                    logger.warning("a document could not be removed from the store: %s", error.strerror)

    def _admit(self) -> None:
        """Begins what can begin: clients with the fewest requests under way first, then those served least recently."""
        while not self._sessions.is_full:
            job = self._next_in_line()
            if job is None:
                return
            request = job.request
            session = self._sessions.take(request.owner, request.prompt.ids)
            if not self._has_room(job, common_prefix(session.token_ids, request.prompt.ids)):
                self._sessions.give_back(request.owner, session)
                return
            with self._changed:
                self._waiting.remove(job)
            self._served.pop(request.client, None)
            self._served[request.client] = max(self._served.values(), default=0) + 1
            if len(self._served) > MOST_CLIENTS:
                self._served.pop(next(iter(self._served)))
            session.stop, session.document = job.must_stop, request.document
            self._running.append(_Running(job, session, self._steps(job, session)))

    def _next_in_line(self) -> Job | None:
        """What is to begin next, after those whose time was up in the line have left it."""
        with self._changed:
            for job in [each for each in self._waiting if each.must_stop()]:
                self._waiting.remove(job)
                job.tell(self._outcome(job))
            under_way = [each.job.request.client for each in self._running]
            line = sorted(
                self._waiting,
                key=lambda job: (under_way.count(job.request.client), self._served.get(job.request.client, 0)),
            )
        return next((each for each in line if not self._is_being_read(each.request)), None)

    def _is_being_read(self, request: Request) -> bool:
        """Whether another of the owner's requests reads the same document now: then it is waited for."""
        begins = request.prompt.ids[:LEAST_TOKENS]
        return len(begins) == LEAST_TOKENS and any(
            (each.job.is_reading or self.store is None)
            and each.job.request.owner == request.owner
            and each.job.request.prompt.ids[:LEAST_TOKENS] == begins
            for each in self._running
        )

    def _has_room(self, job: Job, held: int) -> bool:
        """Whether what is not held of a request fits into memory, next to what those under way will still take.

        Idle sessions are let go for it. What fits into no memory at all is ended.
        """
        request = job.request
        pending = sum(max(0, each.job.request.total - len(each.session.token_ids)) for each in self._running)
        demand = Demand(len(request.prompt.ids) - held, pending, request.max_new_tokens)
        disk = None if self.store is None else self.store.store.limit
        while True:
            try:
                check_room(self.loaded, self.config, demand, self.chunk, disk=disk)
                return True
            except ValueError:
                if self._sessions.drop_oldest():
                    continue
                if self._running:
                    return False
                with self._changed:
                    self._waiting.remove(job)
                words = f"a prompt of {len(request.prompt.ids):,} tokens and an answer of up to {demand.new:,} do not"
                job.tell(Failed("memory", f"{words} fit into this server's memory; send less, or ask for less"))
                return False

    def _steps(self, job: Job, session: Session) -> Iterator[None]:
        """The work on one request, a chunk or a token at each step."""
        request = job.request
        ids, new = request.prompt.ids, request.max_new_tokens
        for choice in range(request.choices):
            for held in session.chunks(ids, new_tokens=new, keep=request.keep):
                if choice == 0:
                    job.held = session.timings.held
                    job.tell(Reading(held, len(ids)))
                job.is_reading = held < len(ids) and choice == 0
                yield
            if job.must_stop():
                return
            watch = Watch(self.config, len(ids)) if request.sources and self.config is not None else None
            grammar = None if request.grammar is None else self.grammars.begin(request.grammar)
            writer = Writer(request, choice, self.loaded.tokenizer, watch, grammar)
            with ExitStack() as stack:
                if watch is not None:
                    stack.enter_context(session.using(watch.context))
                writing = session.write(new, writer.sampling())
                for token in writing:
                    job.written += 1
                    if job.first_token_s is None:
                        job.first_token_s = time.monotonic() - job.began
                    if piece := writer.add(token):
                        job.tell(piece)
                    if writer.is_stopped:
                        break
                    yield
            if job.must_stop():
                return
            if piece := writer.end():
                job.tell(piece)
            is_short = len(writer.token_ids) < new or writer.is_stopped or self._is_end(writer.token_ids)
            job.tell(Ended(choice, "stop" if is_short else "length", tuple(writer.token_ids), writer.sources()))

    def _is_end(self, token_ids: list[int]) -> bool:
        ends = self.loaded.model.generation_config.eos_token_id
        return bool(token_ids) and token_ids[-1] in (ends if isinstance(ends, list) else [ends])


def _failure(error: Exception) -> Failed:
    """What went wrong, in words."""
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return Failed("memory", "the server ran out of memory; send a shorter prompt, or try again later")
    if isinstance(error, ValueError) and "not finite" in str(error):
        return Failed("output", "the model's output for this prompt is not finite")
    if isinstance(error, OutOfFormat):
        return Failed("format", str(error))
    log_mistake(error)
    return Failed("internal", "the server made a mistake; its log says where")
