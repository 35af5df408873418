"""The prompt of a document, and how many of them are the document's."""

from __future__ import annotations

from typing import Any

from dsa.documents import SourceDocument
from dsa.documents.prompt import Prompt, make_prompt
from dsa.models.extension import Demand


def demand_of(prompt: Prompt, new_tokens: int) -> Demand:
    """What reading a prompt and writing `new_tokens` puts into the context."""
    read = prompt.parts.count("document")
    return Demand(read, len(prompt.ids) - read, new_tokens)


def kept_tokens(prompt: Prompt) -> int:
    """How many of a prompt's first tokens are the same whatever is asked: those up to the document's last."""
    last = next((place for place, part in enumerate(reversed(prompt.parts)) if part == "document"), len(prompt.parts))
    return len(prompt.parts) - last


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
        ValueError: As `make_prompt`.
    """
    made = make_prompt(tokenizer, document, ask, tokens=tokens, follow=follow, chat=chat, least=1)
    return made, demand_of(made, new_tokens)
