"""What `dsa chat` talks with: a model, a document if there is one, and what has been said."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from dsa.cli.console import note, notes
from dsa.cli.opening import ModelOptions, announced, model_store, open_model
from dsa.cli.waiting import Steps
from dsa.documents import SourceDocument
from dsa.documents.prompt import Prompt, Turn, make_conversation
from dsa.generation.document import Answer, open_document
from dsa.generation.prompt import demand_of, kept_tokens
from dsa.models.extension import Demand, positions_of
from dsa.models.rope import OFF

if TYPE_CHECKING:
    from dsa.generation.document import DocumentSession
    from dsa.store import Store

ANY_QUESTION = "?"
"""The tokens up to the document's last do not depend on the question."""

ROOM_FOR_ANSWER = 128
"""Positions that are made for an answer at least; as `dsa read` and `dsa generate` have it, so what they read opens."""


class Stop:
    """Whether Ctrl-C was pressed since an answer began: the first ends it between two tokens, the second at once."""

    def __init__(self, is_listening: bool = True) -> None:
        """`is_listening=False` lets Ctrl-C end the program, as over a pipe."""
        self.asked, self._is_listening = False, is_listening

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens while the context is open. What ends at once ends here."""
        self.asked = False
        if not self._is_listening:
            yield
            return
        before = signal.signal(signal.SIGINT, self._press)
        try:
            yield
        except KeyboardInterrupt:
            self.asked = True
        finally:
            signal.signal(signal.SIGINT, before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@dataclass(frozen=True)
class Said:
    """A question, its answer, and of what document."""

    question: str
    answer: Answer
    document: SourceDocument | None
    is_stopped: bool


class Conversation:
    """See the module.

    Attributes:
        document: What is talked about, if anything.
        said: Questions and answers since the last `forget`.
    """

    def __init__(
        self, given: ModelOptions, store: Store | None, *, tokens: int | None, chat: bool | None, stop: Stop
    ) -> None:
        """
        Args:
            given: Which model, and how it is attached and run.
            store: Where what is read is kept; `None` keeps nothing.
            tokens: Read only so many of a document.
            chat: Use the chat template; `None` does so where there is one.
            stop: Asked before every chunk and every token.
        """
        self.said: list[Said] = []
        self.stop = stop
        self._given, self._store, self._tokens, self._chat = given, store, tokens, chat
        self._session: DocumentSession | None = None
        self._steps: Steps | None = None
        self._is_widest = False
        self.document: SourceDocument | None = None

    @property
    def session(self) -> DocumentSession:
        """The open one. Raises as `open`, where that failed before."""
        if self._session is None:
            self.open(self.document)
        assert self._session is not None
        return self._session

    def open(self, document: SourceDocument | None, question: str = ANY_QUESTION, turns: Sequence[Turn] = ()) -> None:
        """Loads the model with positions enough and reads the document, or as much of it as is wanted.

        Args:
            document: What to talk about.
            question: What will be asked, where positions have to be made for it.
            turns: What was said before.

        Raises:
            ValueError: There is no text in it, or it does not fit.
            OSError: The model or the indexers cannot be read.
        """

        def encode(tokenizer: Any) -> tuple[Prompt, Demand]:
            tokens = None if document is None else self._tokens
            prompt = make_conversation(tokenizer, document, [Turn(question)], tokens=tokens, chat=self._chat)
            return prompt, demand_of(prompt, ROOM_FOR_ANSWER)

        if self._session is not None:
            # Two models may not fit into memory, so a document without words is refused before the old one goes.
            encode(self._session.tokenizer)
            self._session.close()
            self._session = None
        self.document, self._is_widest = document, False
        with notes(), Steps(keep=False) as steps:
            loaded, report, prompt = open_model(self._given, encode, steps, store=self._store)
            session = open_document(
                loaded.model,
                loaded.tokenizer,
                document,
                store=model_store(self._store, loaded, prompt),
                turns=turns,
                tokens=None if document is None else self._tokens,
                chat=self._chat,
                stop=self.stop,
                progress=self._progress,
            )
            if document is not None:
                ids = prompt.ids[: kept_tokens(prompt)]
                with self.stop.listening():
                    if session.session.open(prompt.ids) < len(ids):
                        session.session.read(ids, progress=announced(loaded, report, session.session, prompt, steps))
                        session.session.close()
                if self.stop():
                    note("reading was stopped; the next question goes on from there")
        self._session = session

    def ask(self, question: str, say: Callable[[str], None], **options: Any) -> Said | None:
        """Asks, and has the answer said piece by piece, until it ends or is stopped.

        Args:
            question: At least a word.
            say: Called with each piece.
            options: `max_new_tokens` and what else `DocumentSession.stream` takes.

        Returns:
            What was said; `None` where it was stopped before its first word.

        Raises:
            ValueError: As `DocumentSession.stream`, or there are no positions for the question.
        """
        room = self._room(question, options["max_new_tokens"])
        session, before = self.session, len(self.session.turns)
        pieces = session.stream(question, follow_up=True, **{**options, "max_new_tokens": room})
        with notes(), Steps(keep=False) as steps, self.stop.listening():
            self._steps = steps
            try:
                for piece in pieces:
                    steps.pause()
                    say(piece)
            finally:
                self._steps = None
                pieces.close()
        answer = session.answer
        if answer is None or not answer.token_ids:
            return None
        self.said.append(Said(question, answer, session.document, self.stop()))
        if answer.turns < before:
            left = "its first question is" if before == answer.turns + 1 else f"its first {before - answer.turns} are"
            note(f"the conversation is longer than the model's positions: {left} left out")
        return self.said[-1]

    def forget(self) -> None:
        """Begins a new conversation about the same document."""
        self.said = []
        if self._session is not None:
            self._session.forget()

    def close(self) -> None:
        """Waits until what was read is on disk."""
        if self._session is not None:
            self._session.close()

    def _room(self, question: str, wanted: int) -> int:
        """How long the answer may be. Positions are made where not even a short one has any.

        Old turns give way to the question, and to a short answer.
        """
        least = min(wanted, ROOM_FOR_ANSWER)
        prompt, turns = self.session.prompt(question, follow_up=True, max_new_tokens=least)
        positions = positions_of(self.session.session.model.config)
        if positions is None:
            return wanted
        if len(prompt.ids) + least > positions and not turns:
            if self._given.rope_scaling == OFF:
                raise ValueError(
                    f"rope-scaling is off and the model has {positions:,} positions, but with this question "
                    f"{len(prompt.ids):,} tokens would be read; ask a shorter one, or leave --rope-scaling out"
                )
            if self._given.rope_scaling is None and not self._is_widest:
                self.open(self.document, question, self.session.turns)
                now = positions_of(self.session.session.model.config)
                self._is_widest = now is not None and now <= positions
            return least
        return max(least, min(wanted, positions - len(prompt.ids)))

    def _progress(self, label: str, total: int, **more: Any) -> Any:
        assert self._steps is not None
        return self._steps(label, total, **more)
