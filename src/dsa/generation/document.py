"""A document that is read once and asked many times: what `dsa.open` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsa.documents import SourceDocument, read_source
from dsa.documents.prompt import Prompt
from dsa.generation.prompt import encode_prompt
from dsa.generation.sampling import Sampling
from dsa.generation.session import Session, Timings
from dsa.generation.sources import Sources, Watch
from dsa.generation.text import pieces
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
    """

    text: str
    token_ids: list[int] = field(repr=False)
    sources: Sources = field(repr=False)
    timings: Timings


class DocumentSession:
    """See `open_document`.

    Attributes:
        document: What was opened.
        session: The cache with what has been read.
        answer: The last one; `None` before there is one, and while one is being written.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        document: SourceDocument,
        *,
        tokens: int | None,
        chat: bool | None,
        progress: Progress,
    ) -> None:
        self.session, self.tokenizer, self.document = session, tokenizer, document
        self.answer: Answer | None = None
        self._tokens, self._chat, self._progress = tokens, chat, progress

    def ask(self, question: str, *, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0) -> Answer:
        """Asks, and returns the whole answer. Arguments and errors as in `stream`."""
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        for _ in self.stream(question, **options):  # type: ignore[arg-type]
            pass
        assert self.answer is not None
        return self.answer

    def stream(
        self, question: str, *, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0
    ) -> Iterator[str]:
        """Asks, and yields the answer piece by piece; `answer` is there when it has ended, or was closed.

        Each question is asked about the document alone: what an earlier one has in common with it, the document, is
        not read again.

        Args:
            question: In the model's chat template, if it has one.
            max_new_tokens: Tokens to write at most.
            temperature: 0 takes the likeliest token; above 0 samples.
            top_p: Sample from the likeliest tokens of this mass.

        Raises:
            ValueError: The question is empty, or the model's output is not finite.
        """
        if not question.strip():
            raise ValueError("question: expected a text, got an empty one")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.answer = None
        prompt, _ = encode_prompt(
            self.tokenizer, self.document, max_new_tokens, ask=question, tokens=self._tokens, chat=self._chat
        )
        session = self.session
        watch = self._watch(prompt)
        # The question is another one next time.
        keep = len(prompt.ids) - prompt.parts.count("question")
        session.read(prompt.ids, new_tokens=max_new_tokens, keep=keep, progress=self._progress)
        written: list[int] = []
        said: list[str] = []

        def tokens() -> Iterator[int]:
            for token in session.write(max_new_tokens, Sampling(temperature, top_p)):
                written.append(token)
                yield token

        try:
            with nullcontext() if watch is None else session.using(watch.context):
                for piece in pieces(self.tokenizer, tokens()):
                    said.append(piece)
                    yield piece
        finally:
            sources = Sources() if watch is None else watch.sources(prompt)
            self.answer = Answer("".join(said), written, sources, session.timings)

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
    document: str | Path | SourceDocument,
    *,
    store: Store | str | Path | None = None,
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

    Args:
        model: A causal language model: attached, accelerated or plain.
        tokenizer: Its tokenizer.
        document: A `Path`, or the name of a file that exists: PDF, HTML, Markdown or text. Any other string is the
            text itself.
        store: Where what is read is kept, and found again by the next process: a folder, or a `dsa.store.Store`. By
            default it is kept in memory only.
        pages: Of a PDF, as in `dsa generate --pages`.
        tokens: Read only so many of the document.
        chat: Put document and question into the chat template; `None` does so where there is one.
        stop: Asked before every chunk and every token; where it says `True`, reading and writing end.
        progress: Shows how far reading is.

    Raises:
        OSError: The file cannot be read.
        ValueError: There is no text in it, no such pages, or a store is asked for a plain model.
    """
    if not isinstance(document, SourceDocument):
        document = _read(document, pages, progress)
    elif pages is not None:
        raise ValueError("pages: the document has been read already; choose its pages when it is read")
    if isinstance(store, (str, Path)):
        store = Store(store)
    kept = None if store is None else ModelStore(store, model)
    session = Session(model, stop=stop, store=kept, document=document.name)
    return DocumentSession(session, tokenizer, document, tokens=tokens, chat=chat, progress=progress)


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
