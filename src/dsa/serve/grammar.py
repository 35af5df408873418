"""Answers in a format: only tokens that keep the answer within a JSON schema are chosen. llguidance does the work."""

from __future__ import annotations

import json
import threading
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import LogitsProcessor

from dsa.models.loading import LoadedModel

MOST_SCHEMA = 100_000
"""Characters of a schema."""

ANY_OBJECT = {"type": "object"}


class OutOfFormat(ValueError):
    """An answer cannot be kept within its format."""


class Grammars:
    """The formats that a model's tokens can be kept within. Any thread may call it."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None

    def of_schema(self, schema: dict[str, Any]) -> str:
        """The grammar of a JSON schema, for `begin`. Raises `ValueError` where it is none, or has what is not known."""
        written = json.dumps(schema)
        if len(written) > MOST_SCHEMA:
            raise ValueError(f"the schema has {len(written):,} characters; {MOST_SCHEMA:,} is the most")
        # Without this a model may write white space without an end.
        grammar = LLMatcher.grammar_from_json_schema(written, defaults={"whitespace_flexible": False})
        wrong = LLMatcher.validate_grammar(grammar, self._tokenizer())
        if wrong and not wrong.startswith("WARNING"):
            raise ValueError(wrong.strip().splitlines()[0][:300])
        return grammar

    def begin(self, grammar: str) -> Grammar:
        """Keeps one answer within a grammar."""
        return Grammar(LLMatcher(self._tokenizer(), grammar, log_level=0))

    def _tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._made is None:
                tokenizer, model = self._loaded.tokenizer, self._loaded.model
                if not tokenizer.is_fast:
                    raise ValueError("this model's tokenizer has no fast version, which a format needs")
                size = model.config.get_text_config(decoder=True).vocab_size
                self._made = from_tokenizer(tokenizer, n_vocab=max(size, len(tokenizer)))
            return self._made


class Grammar(LogitsProcessor):
    """Where one answer is in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def take(self, token: int) -> bool:
        """One token was written; says whether the answer is complete with it. Raises `OutOfFormat`."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) > 0
        self._check()
        forbidden = ~allowed[: scores.shape[-1]].to(scores.device)
        return scores.masked_fill(forbidden, -torch.inf)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise OutOfFormat(f"response_format: {self._matcher.get_error().strip().splitlines()[0][:300]}")
