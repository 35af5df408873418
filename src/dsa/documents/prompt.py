"""The prompt that a document and questions make, token by token with its place in the document.

Every command that reads a document with a question makes its prompt here, so that they all ask the same.

What users bring and what a chat template says are tokenised apart (`dsa.documents.tokens`): the template is rendered
with placeholders where the texts go. So a document cannot end its turn, which token is whose is known and not searched
for, and the tokens up to the document's last are the same whatever is asked: the empty line between document and
question belongs to the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dsa.documents.source import SourceDocument
from dsa.documents.tokens import TextEncoder

_CUT_MARGIN = 64
_FILE = "dsaplaceholder0file0"
_ASK = "dsaplaceholder{}ask0"
_ANSWER = "dsaplaceholder{}answer0"
_SYSTEM = "dsaplaceholder0system0"


@dataclass(frozen=True)
class Prompt:
    """Tokens and where they come from.

    Args:
        ids: Token ids.
        texts: The text of every token; joined they are the whole prompt. Empty where the tokenizer is not fast, because
            such a one does not tell.
        pages: The document's page of every token; `None` outside it, where it has no pages, and where the tokenizer is
            not fast.
        parts: `"before"`, `"document"` or `"question"` for every token, and `"answer"` for earlier answers.
        document_tokens: Tokens of the whole document; `None` where it was not read to its end.
        is_cut: Whether only the first of them are in the prompt.
        is_joined: Whether the document is several files, whose pages are counted through.
    """

    ids: list[int]
    texts: list[str]
    pages: list[int | None]
    parts: list[str]
    document_tokens: int | None
    is_cut: bool = False
    is_joined: bool = False


@dataclass(frozen=True)
class Turn:
    """A question and what was answered.

    Args:
        ask: The question.
        answer: The tokens of the answer as they were generated, one that ends the text included, or its text where
            there are no tokens; `None` for the one that is to come.
    """

    ask: str
    answer: Sequence[int] | str | None = None


@dataclass(frozen=True)
class _Segment:
    """A stretch of a prompt: a text, words of the template, or tokens as they are."""

    part: str
    text: str = ""
    is_template: bool = False
    ids: Sequence[int] | None = None


@dataclass(frozen=True)
class _Cut:
    """As much of a document as is read."""

    text: str
    tokens: int | None
    is_cut: bool


@dataclass
class _Builder:
    """Puts segments after each other, as tokens."""

    encoder: TextEncoder
    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    document_starts: list[int] = field(default_factory=list)

    def add(self, segments: Sequence[_Segment]) -> None:
        """Adds them; empty ones are passed over."""
        segments = [each for each in segments if each.text or each.ids]
        before: _Segment | None = None
        for place, segment in enumerate(segments):
            if segment.ids is not None:
                self._add_ids(segment)
            else:
                follower = segments[place + 1] if place + 1 < len(segments) else None
                self._add_text(segment, before, more=follower is not None and bool(follower.text))
            before = segment if segment.text else before

    def _add_text(self, segment: _Segment, before: _Segment | None, *, more: bool) -> None:
        first = before is None or (before.is_template and self.encoder.is_first_after(before.text))
        encode = self.encoder.trusted if segment.is_template else self.encoder.text
        encoded = encode(segment.text, first=first, more=more)
        ids, texts, starts = encoded.ids, encoded.texts(segment.text), encoded.starts(segment.text)
        if not ids and self.texts:
            # Whitespace that a tokenizer drops stays in the text.
            self.texts[-1] += segment.text
        if segment.is_template and self.parts[-1:] == ["answer"] and self.ids[-1:] == ids[:1]:
            # The answer wrote the token itself that ends it.
            ids, texts = ids[1:], texts[1:]
        self.ids += ids
        self.texts += texts
        self.parts += [segment.part] * len(ids)
        if segment.part == "document":
            self.document_starts += starts

    def _add_ids(self, segment: _Segment) -> None:
        ids = list(segment.ids or ())
        self.ids += ids
        self.parts += [segment.part] * len(ids)
        decode = self.encoder.tokenizer.decode
        before = ""
        held: list[int] = []
        for number in ids:
            held.append(number)
            # Decoded together: a character of several tokens appears with its last.
            whole = decode(held) if segment.part == "answer" else ""
            text = "" if whole.endswith("\ufffd") else whole[len(before) :]
            self.texts.append(text)
            if text:
                held, before = [number], decode([number])


def make_prompt(
    tokenizer: Any,
    document: SourceDocument,
    ask: str | None = None,
    *,
    tokens: int | None = None,
    follow: str | None = None,
    chat: bool | None = None,
    begin: str | None = None,
    least: int = 2,
) -> Prompt:
    """A document, then a question where there is one.

    Args:
        tokenizer: A transformers tokenizer. One that is not fast does not know the characters of a token, so the prompt
            has no pages; see `check_places`.
        document: What is read.
        ask: The question.
        tokens: How many tokens of the document to take; `None` takes all.
        follow: What follows the document as it stands, in place of a question.
        chat: Put all of it into the chat template, as the user's turn; `None` does so with a question, where there is
            a template.
        begin: The first words of the answer.
        least: Tokens that the document must have.

    Raises:
        ValueError: The document has fewer tokens, it is to be cut and the tokenizer does not say which characters a
            token is, or a chat was asked for and it has no template or one that rewrites the text.
    """
    assert ask is None or follow is None, "a question or a continuation"
    if ask is not None:
        return make_conversation(tokenizer, document, [Turn(ask)], tokens=tokens, chat=chat, begin=begin, least=least)
    encoder = TextEncoder(tokenizer)
    cut = _first_tokens(encoder, document, tokens, least)
    chat = _is_chat(tokenizer, chat, default=False)
    text = cut.text.lstrip() if chat else cut.text
    if chat or follow:
        # The document's tokens are the same whatever comes after its last word.
        follow = text[len(text.rstrip()) :] + follow if follow else ""
        text = text.rstrip()
    segments = [_Segment("document", text), _Segment("question", follow or "")]
    if chat:
        kept = (follow or "").rstrip()
        given = {_FILE: _Segment("document", text)}
        if kept:
            given[_ASK] = _Segment("question", kept)
        # Whether whitespace at its end stays is for the template to say.
        content = "".join(given) + (follow or "")[len(kept) :]
        segments = _worded(_rendered(tokenizer, [{"role": "user", "content": content}]), given)
    return _made(encoder, segments, document, cut, chat=chat, begin=begin)


def make_conversation(
    tokenizer: Any,
    document: SourceDocument | None,
    turns: Sequence[Turn],
    *,
    tokens: int | None = None,
    chat: bool | None = None,
    begin: str | None = None,
    system: str | None = None,
    least: int = 1,
    encoder: TextEncoder | None = None,
) -> Prompt:
    """Questions with their answers, the first after a document where there is one.

    A longer conversation begins with the tokens of the shorter one, followed by those of its answer, whatever a
    template would make of earlier turns: what has been read need not be read again.

    Args:
        tokenizer: As in `make_prompt`.
        document: What is read.
        turns: At least one. All but the last have an answer.
        tokens: How many tokens of the document to take; `None` takes all.
        chat: Use the chat template; `None` does so where there is one.
        begin: The first words of the answer to come.
        system: What the system says, in place of what the template has it say.
        least: Tokens that the document must have.
        encoder: One of this tokenizer that made earlier prompts, and remembers the document's tokens.

    Raises:
        ValueError: As `make_prompt`; no turn, or an earlier one without an answer; or the template refuses these turns.
    """
    if not turns or any(turn.answer is None for turn in turns[:-1]):
        raise ValueError("turns: expected at least one, and an answer in all but the last")
    encoder = encoder or TextEncoder(tokenizer)
    cut = _Cut("", None, False) if document is None else _first_tokens(encoder, document, tokens, least)
    chat = _is_chat(tokenizer, chat, default=True)
    text = cut.text.strip() if chat else cut.text.rstrip()
    segments = _chat_words(tokenizer, text, turns, system) if chat else _plain_words(text, turns, system)
    if turns[-1].answer is not None:
        begin = None
    return _made(encoder, segments, document, cut, chat=chat, begin=begin)


def _chat_words(tokenizer: Any, text: str, turns: Sequence[Turn], system: str | None) -> list[_Segment]:
    """The segments of a conversation in the chat template.

    What stands between two texts is taken from the rendering that ends with the later one, never from a longer one.
    """
    messages = [] if system is None else [{"role": "system", "content": _SYSTEM}]
    given = {} if system is None else {_SYSTEM: _Segment("before", system.strip())}
    if text:
        given[_FILE] = _Segment("document", text)
    segments: list[_Segment] = []
    for number, turn in enumerate(turns):
        ask = _ASK.format(number)
        messages.append({"role": "user", "content": f"{_FILE}\n\n{ask}" if number == 0 and text else ask})
        given[ask] = _Segment("question", turn.ask.strip())
        segments += _worded(_rendered(tokenizer, messages), given)
        if turn.answer is not None:
            answer = _ANSWER.format(number)
            messages.append({"role": "assistant", "content": answer})
            segments.append(_answer(turn.answer))
            # What stood before the answer has been said; of the next rendering what comes after it is taken.
            given = {answer: _Segment("answer")}
    return segments


def _worded(whole: str, given: dict[str, _Segment]) -> list[_Segment]:
    """A rendered template with texts in place of its placeholders, from an earlier answer on where there is one."""
    *parts, end = _split(whole, list(given))
    segments: list[_Segment] = []
    before: _Segment | None = None
    for words, segment in zip(parts, given.values(), strict=True):
        if segment.part == "answer":
            before = segment
            continue
        part = "before" if before is None or before.part == "before" else "question"
        if before is not None and before.part == "document":
            # The document's tokens end with the document.
            segment = _Segment(segment.part, words + segment.text)
        else:
            segments.append(_Segment(part, words, is_template=True))
        segments.append(segment)
        before = segment
    return [*segments, _Segment("question", end, is_template=True)]


def _plain_words(text: str, turns: Sequence[Turn], system: str | None) -> list[_Segment]:
    """The segments of a conversation without a chat template."""
    segments = [_Segment("before", f"{system.strip()}\n\n" if system else ""), _Segment("document", text)]
    for number, turn in enumerate(turns):
        between = "\n\n" if number or text else ""
        segments.append(_Segment("question", f"{between}Question: {turn.ask.strip()}\nAnswer:"))
        if turn.answer is not None:
            segments.append(_answer(turn.answer))
    return segments


def _answer(answer: Sequence[int] | str) -> _Segment:
    return _Segment("answer", answer) if isinstance(answer, str) else _Segment("answer", ids=answer)


def _made(
    encoder: TextEncoder,
    segments: list[_Segment],
    document: SourceDocument | None,
    cut: _Cut,
    *,
    chat: bool,
    begin: str | None,
) -> Prompt:
    """The prompt of these segments, with the document's pages."""
    if begin is not None:
        # A model writes the space in front of a word with the word.
        segments = [*segments, _Segment("question", begin if chat else f" {begin.strip()}")]
    if not chat:
        head, tail = encoder.surrounding
        segments = [_Segment("before", ids=head), *segments, _Segment("question", ids=tail)]
    builder = _Builder(encoder)
    builder.add(segments)
    pages: list[int | None] = [None] * len(builder.ids)
    if document is not None and document.has_pages and builder.document_starts and encoder.tokenizer.is_fast:
        skipped = len(cut.text) - len(cut.text.lstrip()) if chat else 0
        first = builder.parts.index("document")
        for token, start in enumerate(builder.document_starts, first):
            pages[token] = document.page_of(start + skipped)
    texts = builder.texts if encoder.tokenizer.is_fast else []
    is_joined = document is not None and document.is_joined
    return Prompt(builder.ids, texts, pages, builder.parts, cut.tokens, cut.is_cut, is_joined)


def check_places(tokenizer: Any) -> None:
    """Refuses a tokenizer that does not tell which characters a token stands for. Raises `ValueError`."""
    if not tokenizer.is_fast:
        raise ValueError(
            "the model's tokenizer does not tell which characters a token stands for, which pages and passages need; "
            "it has no fast version"
        )


def _first_tokens(encoder: TextEncoder, document: SourceDocument, tokens: int | None, least: int) -> _Cut:
    """The text of the first tokens of a document, or all of it.

    Tokens at the end of what is cut may differ from those of the whole text: the `_CUT_MARGIN` last are not to be used.
    """
    if tokens is not None:
        check_places(encoder.tokenizer)
    size = len(document.text) if tokens is None else 8 * (tokens + _CUT_MARGIN)
    while True:
        text = document.text[:size]
        encoded = encoder.text(text)
        if tokens is None or len(text) == len(document.text) or len(encoded.ids) >= tokens + _CUT_MARGIN:
            break
        size *= 2
    count = len(encoded.ids)
    if count < least:
        raise ValueError(f"file: {document.name} has {count} token(s); at least {least} are needed")
    # Of a text that was not tokenised to its end the length in tokens is not known.
    total = count if len(text) == len(document.text) else None
    is_cut = tokens is not None and tokens < count
    if tokens is not None and is_cut:
        assert encoded.spans is not None
        text = text[: encoded.spans[tokens][0]]
    return _Cut(text, total, is_cut)


def _is_chat(tokenizer: Any, chat: bool | None, *, default: bool) -> bool:
    """Whether the template is used. Raises `ValueError` where it is asked for and there is none."""
    if chat and not tokenizer.chat_template:
        raise ValueError("chat: the model's tokenizer has no chat template; leave --chat out")
    return default and bool(tokenizer.chat_template) if chat is None else chat


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    from jinja2 import TemplateError

    try:
        whole = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"chat: the model's chat template refuses these turns ({error}); use --no-chat") from error
    return str(whole)


def _split(whole: str, marks: Sequence[str]) -> list[str]:
    """What stands before, between and after these placeholders.

    Raises:
        ValueError: One is missing, stands there twice or in another place.
    """
    parts = []
    for mark in marks:
        before, found, whole = whole.partition(mark)
        if not found or mark in whole or any(other in before for other in marks):
            raise ValueError("chat: the model's chat template rewrites what it is given; use --no-chat")
        parts.append(before)
    return [*parts, whole]
