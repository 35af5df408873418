"""The prompt that a document and a question make, token by token with its place in the document."""

from __future__ import annotations

from dataclasses import dataclass

from dsa.documents import SourceDocument
from dsa.models.loading import LoadedModel


@dataclass(frozen=True)
class Prompt:
    """Tokens and where they come from.

    Args:
        ids: Token ids.
        texts: The text of every token; joined they are the whole prompt.
        pages: The document's page of every token; `None` outside it and where it has no pages.
        parts: `"before"`, `"document"` or `"question"` for every token.
        document_tokens: Tokens of the whole document.
        is_cut: Whether only the first of them are in the prompt.
    """

    ids: list[int]
    texts: list[str]
    pages: list[int | None]
    parts: list[str]
    document_tokens: int
    is_cut: bool = False


def make_prompt(
    loaded: LoadedModel,
    document: SourceDocument,
    ask: str | None = None,
    tokens: int | None = None,
    *,
    chat: bool = False,
    begin: str | None = None,
) -> Prompt:
    """A document, then a question where there is one.

    Args:
        loaded: Its tokenizer makes the tokens.
        document: What is read.
        ask: The question.
        tokens: How many tokens of the document to take; `None` takes all.
        chat: Put both into the model's chat template, as the user's turn.
        begin: The first words of the answer.

    Raises:
        ValueError: The document has no two tokens, the tokenizer does not say which characters a token is, or a chat
            was asked for and it has no template.
    """
    tokenizer = loaded.tokenizer
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {loaded.name} does not tell which characters a token stands for, which a report needs; "
            "it has no fast version"
        )
    text = document.text
    starts = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(starts) < 2:
        raise ValueError(f"file: {document.name} has {len(starts)} token(s); at least 2 are needed")
    document_tokens = len(starts)
    is_cut = tokens is not None and tokens < document_tokens
    if is_cut:
        assert tokens is not None
        text = text[: starts[tokens][0]]
    if chat:
        if not tokenizer.chat_template:
            raise ValueError(f"chat: the tokenizer of {loaded.name} has no chat template; leave --chat out")
        turns = [{"role": "user", "content": text.strip() + (f"\n\n{ask}" if ask else "")}]
        whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        place = whole.index(text.strip()) - (len(text) - len(text.lstrip()))
    elif ask is None:
        whole, place = text, 0
    else:
        whole, place = f"{text.rstrip()}\n\nQuestion: {ask}\nAnswer:", 0
    if begin is not None:
        # A model writes the space in front of a word with the word.
        whole += begin if chat else f" {begin.strip()}"
    encoded = tokenizer(whole, add_special_tokens=not chat, return_offsets_mapping=True, verbose=False)
    offsets = [start for start, _ in encoded["offset_mapping"]]
    # What lies between two tokens' characters belongs to the first: nothing of the text is lost.
    ends = [*offsets[1:], len(whole)]
    offsets[0] = 0
    texts = [whole[start : max(start, end)] for start, end in zip(offsets, ends, strict=True)]
    inside = [place <= start < place + len(text) and bool(each) for start, each in zip(offsets, texts, strict=True)]
    within = [token for token, each in enumerate(inside) if each]
    first, last = within[0], within[-1]
    parts = ["before"] * first + ["document"] * (last + 1 - first) + ["question"] * (len(texts) - last - 1)
    pages: list[int | None] = [None] * len(texts)
    if document.has_pages:
        for token in range(first, last + 1):
            pages[token] = document.page_of(min(max(0, offsets[token] - place), len(document.text) - 1))
    return Prompt(list(encoded["input_ids"]), texts, pages, parts, document_tokens, is_cut)
