"""A document that is read once and asked many times, or a conversation without one: what `dsa.open` returns."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsa.documents import SourceDocument, read_source
from dsa.documents.prompt import Prompt, Turn, make_conversation
from dsa.documents.tokens import TextEncoder
from dsa.generation.prompt import kept_tokens
from dsa.generation.sampling import Sampling
from dsa.generation.session import Session, Timings
from dsa.generation.sources import Sources, Watch
from dsa.generation.text import pieces
from dsa.models.extension import positions_of
from dsa.models.sparse import is_sparse, sparse_report_of
from dsa.runs.progress import Progress, silent
from dsa.store import ModelStore, Store


@dataclass(frozen=True)
class Answer:
    """What a model wrote about a document.

    Args:
        text: The answer, without special tokens.
        token_ids: The tokens of it, one that ends the text included.
        sources: Pages and passages that were read for it; empty for dense models and where all was read.
        timings: What reading and writing took; `timings.held` tokens were not read again.
        turns: How many earlier questions with their answers it was given.
    """

    text: str
    token_ids: list[int] = field(repr=False)
    sources: Sources = field(repr=False)
    timings: Timings
    turns: int = 0


class DocumentSession:
    """See `open_document`.

    Attributes:
        document: What was opened; `None` for a conversation without one.
        session: The cache with what has been read.
        turns: The conversation so far: what a question with `follow_up` follows.
        answer: The last one; `None` before there is one, and while one is being written.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        document: SourceDocument | None,
        *,
        turns: Sequence[Turn] = (),
        tokens: int | None,
        chat: bool | None,
        progress: Progress,
    ) -> None:
        self.session, self.tokenizer, self.document = session, tokenizer, document
        self.turns = list(turns)
        self.answer: Answer | None = None
        self._tokens, self._chat, self._progress = tokens, chat, progress
        self._encoder = TextEncoder(tokenizer)
        # The latest prompt and what it was made for: who looks at it first does not make it twice.
        self._made: tuple[object, tuple[Prompt, list[Turn]]] | None = None

    def ask(
        self,
        question: str,
        *,
        follow_up: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Answer:
        """Asks, and returns the whole answer. Arguments and errors as in `stream`."""
        sampling = Sampling(temperature, top_p)
        for _ in self._asked(question, follow_up, max_new_tokens, sampling):
            pass
        assert self.answer is not None
        return self.answer

    def stream(
        self,
        question: str,
        *,
        follow_up: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Generator[str, None, None]:
        """Asks, and yields the answer piece by piece; `answer` is there when it has ended, or was closed.

        What a question has in common with what was read before is not read again: the document, and with `follow_up`
        the conversation. Where the conversation has outgrown the model's positions, its oldest turns are left out.

        Args:
            question: In the model's chat template, if it has one.
            follow_up: Ask it after the questions before and their answers. Without it, it is asked about the document
                alone, and begins a new conversation.
            max_new_tokens: Tokens to write at most.
            temperature: 0 takes the likeliest token; above 0 samples.
            top_p: Sample from the likeliest tokens of this mass.

        Raises:
            ValueError: The question is empty, or the model's output is not finite.
        """
        yield from self._asked(question, follow_up, max_new_tokens, Sampling(temperature, top_p))

    def forget(self) -> None:
        """Begins a new conversation; the document stays."""
        self.turns = []

    def prompt(self, question: str, *, follow_up: bool = False, max_new_tokens: int = 128) -> tuple[Prompt, list[Turn]]:
        """What `stream` reads for a question, and the turns in it. Arguments and errors as there."""
        if not question.strip():
            raise ValueError("question: expected a text, got an empty one")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        wanted = question, list(self.turns) if follow_up else []
        made = self._made[1] if self._made is not None and self._made[0] == wanted else None
        positions = positions_of(self.session.model.config)
        turns = list(wanted[1] if made is None else made[1])
        while True:
            if made is None:
                asked = [*turns, Turn(question)]
                prompt = make_conversation(
                    self.tokenizer, self.document, asked, tokens=self._tokens, chat=self._chat, encoder=self._encoder
                )
                made = prompt, turns
            if not turns or positions is None or len(made[0].ids) + max_new_tokens <= positions:
                self._made = wanted, made
                return made
            turns, made = turns[1:], None

    def _asked(self, question: str, follow_up: bool, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        prompt, turns = self.prompt(question, follow_up=follow_up, max_new_tokens=max_new_tokens)
        self.answer = None
        session = self.session
        watch = self._watch(prompt)
        # The question is another one next time.
        keep = None if self.document is None else kept_tokens(prompt)
        session.read(prompt.ids, new_tokens=max_new_tokens, keep=keep, progress=self._progress)
        if session.logits is None:
            # Stopped before its end: there is nothing to write.
            self.answer = Answer("", [], Sources(), session.timings, len(turns))
            return
        written: list[int] = []
        said: list[str] = []

        def tokens() -> Iterator[int]:
            for token in session.write(max_new_tokens, sampling):
                written.append(token)
                yield token

        try:
            with nullcontext() if watch is None else session.using(watch.context):
                for piece in pieces(self.tokenizer, tokens()):
                    said.append(piece)
                    yield piece
        finally:
            sources = Sources() if watch is None else watch.sources(prompt)
            self.answer = Answer("".join(said), written, sources, session.timings, len(turns))
            if written:
                self.turns = [*turns, Turn(question, written)]
            session.keep_answer()

    def close(self) -> None:
        """Waits until what was read is in the store, where there is one. Leaving the context calls it."""
        self.session.close()

    def __enter__(self) -> DocumentSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _watch(self, prompt: Prompt) -> Watch | None:
        model = self.session.model
        return Watch(sparse_report_of(model).config, len(prompt.ids)) if is_sparse(model) else None


def open_document(
    model: Any,
    tokenizer: Any,
    document: str | Path | SourceDocument | None = None,
    *,
    store: Store | ModelStore | str | Path | None = None,
    turns: Sequence[Turn] = (),
    pages: str | None = None,
    tokens: int | None = None,
    chat: bool | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = silent,
) -> DocumentSession:
    """Opens a document to ask a model about it, as often as one likes; it is read with the first question.

        session = dsa.open(model, tokenizer, Path("report.pdf"))
        answer = session.ask("Who signed it?")
        print(answer.text, answer.sources.pages)
        answer = session.ask("And when?", follow_up=True)

    Args:
        model: A causal language model: attached, accelerated or plain.
        tokenizer: Its tokenizer.
        document: A `Path`, or the name of a file that exists: PDF, HTML, Markdown or text. Any other string is the
            text itself. `None` is a conversation without a document.
        store: Where what is read and answered is kept, and found again by the next process: a folder, a
            `dsa.store.Store`, or one `dsa.store.ModelStore` for many sessions of the same model, whose weights are
            then looked at once. By default it is kept in memory only.
        turns: A conversation to go on with: what `turns` of another session was, or questions and answers as texts.
        pages: Of a PDF, as in `dsa generate --pages`.
        tokens: Read only so many of the document.
        chat: Put document and question into the chat template; `None` does so where there is one.
        stop: Asked before every chunk and every token; where it says `True`, reading and writing end.
        progress: Shows how far reading is.

    Raises:
        OSError: The file cannot be read.
        ValueError: There is no text in it, no such pages, or a store is asked for a plain model.
    """
    if document is None:
        if pages is not None or tokens is not None:
            raise ValueError("pages, tokens: there is no document to take them of; give one, or leave them out")
    elif not isinstance(document, SourceDocument):
        document = _read(document, pages, progress)
    elif pages is not None:
        raise ValueError("pages: the document has been read already; choose its pages when it is read")
    if isinstance(store, (str, Path)):
        store = Store(store)
    if isinstance(store, Store):
        store = ModelStore(store, model)
    session = Session(model, stop=stop, store=store, document="" if document is None else Path(document.name).name)
    return DocumentSession(session, tokenizer, document, turns=turns, tokens=tokens, chat=chat, progress=progress)


def _read(document: str | Path, pages: str | None, progress: Progress) -> SourceDocument:
    if isinstance(document, Path) or _is_file(document):
        return read_source(document, progress=progress, pages=pages)
    if pages is not None:
        raise ValueError("pages: a text has no pages; give a PDF's path")
    if not document.strip():
        raise ValueError("document: expected a path or a text, got an empty text")
    return SourceDocument(document, "the text")


def _is_file(text: str) -> bool:
    try:
        return "\n" not in text and Path(text).is_file()
    except (OSError, ValueError):
        # Too long for a name, or with a character that no name has.
        return False
