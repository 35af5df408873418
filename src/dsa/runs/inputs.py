"""The text a model is measured on: the Python language reference, or any document that can be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsa.documents import SourceDocument, read_source
from dsa.documents.tokens import TextEncoder
from dsa.runs.progress import Progress

if TYPE_CHECKING:
    import torch

LANGUAGE_REFERENCE = "the Python language reference"
# Tokens at the cut end of a text may differ from those of the whole; only what lies this far before it is kept.
CUT_MARGIN = 64
MIN_TOKENS = 2


# What is measured on is any text with a name; one that was read from a PDF has pages too.
Document = SourceDocument


def read_document(
    path: str | Path | None = None, argument: str = "file", *, progress: Progress | None = None
) -> Document:
    """Reads a text to measure on.

    Args:
        path: A PDF, HTML, Markdown or text file, see `dsa.documents.read_source`. `None` takes the Python language
            reference that every interpreter carries, all topics in alphabetical order.
        argument: What the user called it, for messages.
        progress: Shows how far reading a PDF is.

    Raises:
        OSError: No such file, a directory, or no permission.
        ValueError: The file is empty, or holds no text that can be read.
    """
    if path is None:
        from pydoc_data.topics import topics

        return Document("\n\n".join(topics[name].strip() for name in sorted(topics)), LANGUAGE_REFERENCE)
    return read_source(path, argument, progress=progress)


def encode(
    document: Document, tokenizer: Any, tokens: int | None = None, *, default: int = 8192, argument: str = "file"
) -> torch.Tensor:
    """The first tokens of a document, with the special tokens that the tokenizer adds; its words become none of them.

    Args:
        document: What to encode. Only as much of it as is needed is tokenised.
        tokenizer: A transformers tokenizer.
        tokens: How many to return. `None` takes `default`, or all of a shorter document.
        default: See `tokens`.
        argument: What the user called the document, for messages.

    Returns:
        int64 `[1, tokens]`.

    Raises:
        ValueError: The document has fewer tokens than asked for, or fewer than two.
    """
    if tokens is not None and tokens < MIN_TOKENS:
        raise ValueError(f"tokens must be at least {MIN_TOKENS}, got {tokens}")
    import torch

    encoder = TextEncoder(tokenizer)
    wanted = default if tokens is None else tokens
    ids = first_tokens(document.text, wanted, lambda part: encoder.texts([part])[0])
    if len(ids) < MIN_TOKENS:
        raise ValueError(f"{argument}: {document.name} has {len(ids)} token(s); at least {MIN_TOKENS} are needed")
    if tokens is not None and len(ids) < tokens:
        raise ValueError(
            f"tokens: {document.name} has only {len(ids):,} tokens, {tokens:,} were asked for; "
            "ask for fewer or give a longer text"
        )
    return torch.tensor([ids[:wanted]], dtype=torch.int64)


def first_tokens(text: str, wanted: int, count: Callable[[str], list[int]]) -> list[int]:
    """The first tokens of a text, of which no more is tokenised than it takes.

    Args:
        text: All of it.
        wanted: How many tokens are enough.
        count: Tokenises a part that begins the text.

    Returns:
        At least so many, where the text has them. Those after them may be other ones than the whole text has.
    """
    size = 8 * (wanted + CUT_MARGIN)
    while True:
        part = text[:size]
        ids = count(part)
        if len(part) == len(text) or len(ids) >= wanted + CUT_MARGIN:
            return ids
        size *= 2
