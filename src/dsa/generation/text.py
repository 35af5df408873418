"""Tokens as text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class TextPieces:
    """The text of tokens as they come, without special tokens; joined it is the text of all of them.

    A character of several tokens comes with its last. Where a token stands decides about the space in front of it, so
    each is decoded together with the piece before.
    """

    def __init__(self, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: A transformers tokenizer.
        """
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = ""
        self._known = 0

    def add(self, token: int) -> str:
        """The text that is known with this token; often none."""
        self._window.append(token)
        text = self._text()
        if len(text) <= len(self._given) or text.endswith("\ufffd"):
            return ""
        piece = text[len(self._given) :]
        del self._window[: self._known]
        self._known = len(self._window)
        self._given = self._text()
        return piece

    def rest(self) -> str:
        """What is left after the last token: part of a character, as a rule nothing."""
        return self._text()[len(self._given) :]

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._window, skip_special_tokens=True))


def pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens piece by piece, as `TextPieces` gives it.

    Args:
        tokenizer: A transformers tokenizer.
        tokens: Token ids, such as `Session.write` yields.
    """
    text = TextPieces(tokenizer)
    for token in tokens:
        if piece := text.add(token):
            yield piece
    if rest := text.rest():
        yield rest
