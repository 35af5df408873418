"""Messages as a prompt: the document first, then the conversation.

Earlier answers are put in as the tokens that were written, where this server wrote them, so that a conversation's next
turn begins with exactly what has been read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsa.documents import SourceDocument
from dsa.documents.prompt import Prompt, Turn, make_conversation, make_prompt
from dsa.generation.prompt import kept_tokens
from dsa.serve.errors import Refused
from dsa.text import checked

REMEMBERED = 1000
"""Answers whose tokens are remembered."""


@dataclass(frozen=True)
class Message:
    """What somebody said.

    Args:
        role: `"system"`, `"user"` or `"assistant"`.
        text: What was said.
    """

    role: str
    text: str


@dataclass(frozen=True)
class Asked:
    """A prompt with what its document is.

    Args:
        prompt: Tokens.
        keep: How many of the first are worth keeping.
        document: What the document is called.
        skipped: White space that the document begins with and the prompt does not have, in characters.
    """

    prompt: Prompt
    keep: int
    document: str = ""
    skipped: int = 0


class Prompts:
    """Makes prompts; see the module. Any thread may call it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        self._answers: OrderedDict[tuple[str, str], tuple[int, ...]] = OrderedDict()

    def remember(self, owner: str, text: str, token_ids: tuple[int, ...]) -> None:
        """Remembers the tokens of an answer that was written."""
        with self._lock:
            self._answers[owner, text] = token_ids
            self._answers.move_to_end((owner, text))
            while len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)

    def chat(self, messages: Sequence[Message], document: SourceDocument | None, owner: str) -> Asked:
        """The prompt of a conversation. Raises `Refused` for one that no template takes."""
        system, turns = self._turns(messages, owner)
        with self._lock:
            try:
                made = make_conversation(self.tokenizer, document, turns, system=system)
            except ValueError as error:
                raise Refused(_in_words(error), "messages") from error
        if document is None:
            return Asked(made, 0)
        skipped = len(document.text) - len(document.text.lstrip()) if self.tokenizer.chat_template else 0
        return Asked(made, kept_tokens(made), document.name, skipped)

    def plain(self, text: str) -> Asked:
        """The prompt of a text that is continued. Raises `Refused` for none."""
        document = SourceDocument(_checked(text, "prompt"), "the prompt")
        if not document.text:
            raise Refused("prompt: expected a text, got an empty one", "prompt")
        with self._lock:
            try:
                made = make_prompt(self.tokenizer, document, least=1)
            except ValueError as error:
                raise Refused(_in_words(error), "prompt") from error
        return Asked(made, 0)

    def ids(self, ids: list[int]) -> Asked:
        """A prompt of token ids as they are. Raises `Refused` for none, and for ids that no token has."""
        most = len(self.tokenizer)
        if not ids or not all(0 <= each < most for each in ids):
            raise Refused(f"prompt: expected ids of tokens, from 0 to {most - 1}", "prompt")
        return Asked(Prompt(ids, [], [None] * len(ids), ["document"] * len(ids), len(ids)), 0)

    def _turns(self, messages: Sequence[Message], owner: str) -> tuple[str | None, list[Turn]]:
        said = _joined(messages)
        system = None
        if said and said[0].role == "system":
            system, said = said[0].text, said[1:]
        roles = [each.role for each in said]
        if "system" in roles:
            raise Refused("messages: a system message must be the first", "messages")
        if roles[:1] != ["user"] or roles[-1:] != ["user"]:
            raise Refused("messages: the first after a system message and the last must be the user's", "messages")
        turns = []
        for number in range(0, len(said), 2):
            answer: Sequence[int] | str | None = None
            if number + 1 < len(said):
                text = said[number + 1].text
                answer = self._answers.get((owner, text), text)
            turns.append(Turn(said[number].text, answer))
        return system, turns


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Messages of one role after each other are one."""
    joined: list[Message] = []
    for each in messages:
        message = Message(each.role, _checked(each.text, "messages"))
        if joined and joined[-1].role == message.role:
            message = Message(message.role, f"{joined.pop().text}\n\n{message.text}")
        joined.append(message)
    return joined


def _checked(text: str, param: str) -> str:
    try:
        return checked(text, f"{param}:")
    except ValueError as error:
        raise Refused(str(error), param) from error


def _in_words(error: ValueError) -> str:
    """Without the advice that names options of the command line."""
    return str(error).partition("; use --no-chat")[0]
