"""The prompt of a document, and how many of them are the document's."""

from __future__ import annotations

from typing import Any

from dsa.documents import SourceDocument
from dsa.documents.prompt import Prompt, make_prompt, word_prompt
from dsa.models.extension import Demand


def demand_of(prompt: Prompt, new_tokens: int) -> Demand:
    """What reading a prompt and writing `new_tokens` puts into the context."""
    read = prompt.parts.count("document")
    return Demand(read, len(prompt.ids) - read, new_tokens)


def encode_prompt(
    tokenizer: Any,
    document: SourceDocument,
    new_tokens: int,
    *,
    ask: str | None = None,
    tokens: int | None = None,
    follow: str | None = None,
    chat: bool | None = None,
) -> tuple[Prompt, Demand]:
    """A prompt, and how many of its tokens are what; `ask` to `chat` as in `dsa.documents.prompt.make_prompt`.

    A tokenizer that does not tell which characters a token stands for gives a prompt without texts and pages.

    Raises:
        ValueError: A chat was asked for and the tokenizer has no template, or a cut text and it cannot tell where.
    """
    if tokens is not None or tokenizer.is_fast:
        made = make_prompt(tokenizer, document, ask, tokens=tokens, follow=follow, chat=chat, least=1)
        return made, demand_of(made, new_tokens)
    words = word_prompt(tokenizer, document.text, ask, follow=follow, chat=chat)
    ids = tokenizer(words.text, add_special_tokens=words.add_special_tokens, verbose=False)["input_ids"]
    made = Prompt(ids, [], [None] * len(ids), ["document"] * len(ids), None)
    return made, Demand(len(ids), 0, new_tokens)
