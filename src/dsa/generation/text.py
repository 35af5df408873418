"""Tokens as text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, without special tokens; joined it is the text of all of them.

    A character of several tokens comes with its last. Where a token stands decides about the space in front of it, so
    each is decoded together with the piece before.

    Args:
        tokenizer: A transformers tokenizer.
        tokens: Token ids, such as `Session.write` yields.
    """
    window: list[int] = []
    given = ""
    known = 0
    for token in tokens:
        window.append(token)
        text = tokenizer.decode(window, skip_special_tokens=True)
        if len(text) <= len(given) or text.endswith("\ufffd"):
            continue
        yield text[len(given) :]
        del window[:known]
        known = len(window)
        given = tokenizer.decode(window, skip_special_tokens=True)
    rest = tokenizer.decode(window, skip_special_tokens=True)[len(given) :]
    if rest:
        yield rest
