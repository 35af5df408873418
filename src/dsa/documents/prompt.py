"""The prompt that a document and a question make, token by token with its place in the document.

Every command that reads a document with a question makes its prompt here, so that they all ask the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsa.documents.source import SourceDocument

_CUT_MARGIN = 64


@dataclass(frozen=True)
class Prompt:
    """Tokens and where they come from.

    Args:
        ids: Token ids.
        texts: The text of every token; joined they are the whole prompt.
        pages: The document's page of every token; `None` outside it and where it has no pages.
        parts: `"before"`, `"document"` or `"question"` for every token.
        document_tokens: Tokens of the whole document; `None` where it was not read to its end.
        is_cut: Whether only the first of them are in the prompt.
    """

    ids: list[int]
    texts: list[str]
    pages: list[int | None]
    parts: list[str]
    document_tokens: int | None
    is_cut: bool = False


@dataclass(frozen=True)
class Wording:
    """A prompt as text.

    Args:
        text: All of it.
        begin: Where in it the document begins.
        end: Behind the document's last character.
        skipped: Characters left out at the document's beginning.
        add_special_tokens: Whether the tokenizer is to add its own; a chat template brings them.
    """

    text: str
    begin: int
    end: int
    skipped: int
    add_special_tokens: bool


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
        tokenizer: A fast tokenizer of transformers, which knows the characters of every token.
        document: What is read.
        ask: The question.
        tokens: How many tokens of the document to take; `None` takes all.
        follow: What follows the document as it stands, in place of a question.
        chat: Put all of it into the chat template, as the user's turn; `None` does so with a question, where there is
            a template.
        begin: The first words of the answer.
        least: Tokens that the document must have.

    Raises:
        ValueError: The document has fewer tokens, the tokenizer does not say which characters a token is, or a chat
            was asked for and it has no template or one that rewrites the text.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            "the model's tokenizer does not tell which characters a token stands for, which pages and passages need; "
            "it has no fast version"
        )
    text = document.text
    text, starts = _first_tokens(tokenizer, text, tokens)
    if len(starts) < least:
        raise ValueError(f"file: {document.name} has {len(starts)} token(s); at least {least} are needed")
    # Of a text that was not tokenised to its end the length in tokens is not known.
    total = len(starts) if len(text) == len(document.text) else None
    is_cut = tokens is not None and tokens < len(starts)
    if tokens is not None and is_cut:
        text = text[: starts[tokens][0]]
    whole = word_prompt(tokenizer, text, ask, follow=follow, chat=chat, begin=begin)
    special = whole.add_special_tokens
    encoded = tokenizer(whole.text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    offsets = [start for start, _ in encoded["offset_mapping"]]
    # What lies between two tokens' characters belongs to the first: nothing of the text is lost.
    ends = [*offsets[1:], len(whole.text)]
    offsets[0] = 0
    texts = [whole.text[start : max(start, end)] for start, end in zip(offsets, ends, strict=True)]
    inside = [whole.begin <= start < whole.end and bool(each) for start, each in zip(offsets, texts, strict=True)]
    within = [token for token, each in enumerate(inside) if each]
    first, last = within[0], within[-1]
    parts = ["before"] * first + ["document"] * (last + 1 - first) + ["question"] * (len(texts) - last - 1)
    pages: list[int | None] = [None] * len(texts)
    if document.has_pages:
        for token in range(first, last + 1):
            pages[token] = document.page_of(offsets[token] - whole.begin + whole.skipped)
    return Prompt(list(encoded["input_ids"]), texts, pages, parts, total, is_cut)


def _first_tokens(tokenizer: Any, text: str, tokens: int | None) -> tuple[str, list[tuple[int, int]]]:
    """As much of a text as holds so many tokens and some more, and where its tokens begin and end.

    Tokens at the end of what is cut may differ from those of the whole text: the `_CUT_MARGIN` last are not to be used.
    """
    size = len(text) if tokens is None else 8 * (tokens + _CUT_MARGIN)
    while True:
        part = text[:size]
        starts = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        if tokens is None or len(part) == len(text) or len(starts) >= tokens + _CUT_MARGIN:
            return part, starts
        size *= 2


def word_prompt(
    tokenizer: Any,
    text: str,
    ask: str | None = None,
    *,
    follow: str | None = None,
    chat: bool | None = None,
    begin: str | None = None,
) -> Wording:
    """The words of a prompt, for tokenizers of any kind; arguments as in `make_prompt`.

    Raises:
        ValueError: A chat was asked for, and there is no template or one that rewrites the text.
    """
    assert ask is None or follow is None, "a question or a continuation"
    template = tokenizer.chat_template
    if chat is None:
        chat = ask is not None and bool(template)
    if chat and not template:
        raise ValueError("chat: the model's tokenizer has no chat template; leave --chat out")
    shown = text.lstrip() if chat else text
    if ask or (chat and not follow):
        shown = shown.rstrip()
    if chat:
        content = shown + (f"\n\n{ask.strip()}" if ask else follow or "")
        turns = [{"role": "user", "content": content}]
        whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        place = whole.find(shown)
        if place < 0:
            raise ValueError("chat: the model's chat template rewrites what it is given; use --no-chat")
    else:
        whole = f"{shown}\n\nQuestion: {ask.strip()}\nAnswer:" if ask else shown + (follow or "")
        place = 0
    if begin is not None:
        # A model writes the space in front of a word with the word.
        whole += begin if chat else f" {begin.strip()}"
    skipped = len(text) - len(text.lstrip()) if chat else 0
    return Wording(whole, place, place + len(shown), skipped, add_special_tokens=not chat)
