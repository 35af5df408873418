"""What is asked of the engine, and what it tells while it works on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dsa.documents.prompt import Prompt
from dsa.generation.sources import PageShare, SourcePassage

TOP_LOGPROBS = 20
"""Of the likeliest tokens that can be asked for, next to the chosen one."""


@dataclass(frozen=True)
class Request:
    """A prompt and how it is answered.

    Args:
        prompt: What is read.
        owner: Whose what was read is; no other owner's request finds it.
        client: Who waits in line. Clients take turns.
        document: What to call the document that is read.
        keep: How many of the prompt's first tokens are worth keeping on disk.
        max_new_tokens: Tokens of each answer at most.
        choices: How many answers.
        temperature: 0 takes the likeliest token.
        top_p: Sample from the likeliest tokens of this mass.
        seed: Of the first answer; each further one takes the next number.
        stop: Texts that end an answer and are not part of it.
        logprobs: How many of the likeliest tokens to tell with each token; `None` tells none.
        presence_penalty: Taken off the scores of tokens that the answer has.
        frequency_penalty: The same for each time that it has them.
        sources: Whether to tell where each sentence was read.
        grammar: What the answer is kept within, of `dsa.serve.grammar`.
    """

    prompt: Prompt
    owner: str = ""
    client: str = ""
    document: str = ""
    keep: int = 0
    max_new_tokens: int = 128
    choices: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    sources: bool = False
    grammar: str | None = None

    @property
    def total(self) -> int:
        """Positions that the longest answer takes."""
        return len(self.prompt.ids) + self.max_new_tokens


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, before temperature and penalties.

    Args:
        token: Its id.
        text: It alone, as text.
        logprob: Natural logarithm of its probability.
        top: The likeliest tokens in its place: id, text, logarithm.
    """

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class SentenceSources:
    """What was read for a sentence of an answer.

    Args:
        start: The sentence's first character in the answer.
        end: The character after its last.
        pages: Most read first.
        passages: Most read first.
    """

    start: int
    end: int
    pages: tuple[PageShare, ...]
    passages: tuple[SourcePassage, ...]


@dataclass(frozen=True)
class Reading:
    """So many tokens of the prompt have been read, or were held."""

    held: int
    total: int


@dataclass(frozen=True)
class Piece:
    """More of an answer; the text is empty where only tokens are told."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Ended:
    """An answer has ended.

    Args:
        choice: Which.
        reason: `"stop"` at its end or a stop text, `"length"` at `max_new_tokens`.
        token_ids: As they were written.
        sources: Of each sentence, where they were asked for.
    """

    choice: int
    reason: str
    token_ids: tuple[int, ...]
    sources: tuple[SentenceSources, ...] = ()


@dataclass(frozen=True)
class Done:
    """Everything has been written.

    Args:
        read: Tokens of the prompt.
        held: Of them, those that were not read again.
        written: Tokens of all answers.
        first_token_s: Seconds from the request to the first token.
    """

    read: int
    held: int
    written: int
    first_token_s: float | None


@dataclass(frozen=True)
class Failed:
    """Nothing more will come.

    Args:
        kind: `"memory"`, `"time"`, `"output"` for output that is not finite, `"format"` for an answer that cannot be
            kept within its format, `"stopped"` by the server's end, or `"internal"`.
        message: For the client.
    """

    kind: str
    message: str


Event = Reading | Piece | Ended | Done | Failed


@dataclass
class Job:
    """A request on its way.

    Args:
        request: What is asked.
        listener: Called with every event, in the inference thread. `Done` and `Failed` are the last.
        deadline: On the clock of `time.monotonic`.
    """

    request: Request
    listener: Callable[[Event], None]
    deadline: float
    began: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    is_reading: bool = True
    first_token_s: float | None = None
    held: int = 0
    written: int = 0

    def cancel(self) -> None:
        """Has the work stop before the next chunk or token. Nothing is told after that. Any thread may call it."""
        self.is_cancelled = True

    def must_stop(self) -> bool:
        """Whether it was cancelled, or its time is up."""
        return self.is_cancelled or time.monotonic() > self.deadline

    def tell(self, event: Event) -> None:
        if not self.is_cancelled:
            self.listener(event)
